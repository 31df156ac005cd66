"""The speed benchmark of text-encoder scans runs at small sizes, and both ways compute the same."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from gazeguard.bench.amdet_speed.__main__ import main
from gazeguard.bench.amdet_speed.measures import WAYS, _schedule
from gazeguard.bench.amdet_speed.public import PublicWay
from gazeguard.bench.amdet_speed.subject import Pair, Shape, random_pair
from gazeguard.data.prompts import built_in
from gazeguard.methods.amdet import Settings
from gazeguard.methods.amdet.heldout import held_out
from gazeguard.methods.amdet.inversion import invert
from gazeguard.methods.amdet.surface import surface

SETTINGS = Settings.published(surface_prompts=1, points=4)


@pytest.mark.slow
def test_quick_run_measures_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "amdet_speed.json"
    done = CliRunner().invoke(main, ["--out", str(out), "--quick"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["quick"]
    # whole scans: 1 + 3 + 2 x 3; true shape: 1 + 2 x (1 + 3); scaling: 2 + 1 + 1; memory: 2
    assert len(result["figures"]) == 10 + 9 + 4 + 2
    for figure in result["figures"]:
        assert figure["name"] in done.output, "the table leaves a figure out"
        assert figure["target"] == "-", "small sizes have no target to meet"
        if "memory" not in figure["name"] or sys.platform == "linux":
            assert figure["value"]["median"] >= 0
    whole = result["raw"]["whole scans"]
    assert set(whole["outcomes"]) == {"public", *WAYS}
    assert all(len(outcomes) == 2 for outcomes in whole["outcomes"].values())


@pytest.fixture(scope="module")
def pair() -> Pair:
    return random_pair(Shape(width=32, layers=2, heads=4, vocabulary=2000, length=24))


@pytest.fixture(scope="module")
def way(pair: Pair) -> PublicWay:
    prompts = built_in(6)
    slotted, plain = (pair.suspect.tokenise(prompts, slot=slot) for slot in (True, False))
    return PublicWay(pair.suspect, pair.anchor, slotted, plain, SETTINGS)


def test_the_schedule_is_that_of_the_search() -> None:
    assert _schedule(Settings(restarts=4, halving=15), 100) == {4: 15, 2: 15, 1: 70}
    assert _schedule(Settings(restarts=4, halving=15), 20) == {4: 15, 2: 5}
    assert _schedule(Settings(restarts=5, halving=0), 20) == {5: 20}
    settings = Settings(restarts=5, halving=4, patience=0, steps=11)
    pair = random_pair(Shape(width=32, layers=1, heads=4, vocabulary=2000, length=24))
    tokens, plain = (pair.suspect.tokenise(built_in(20), slot=slot) for slot in (True, False))
    alive = invert(pair.suspect, pair.anchor, tokens, plain, settings).losses.isfinite().sum(1)
    assert Counter(alive.tolist()) == _schedule(settings, 11)


def test_held_out_prompts_one_by_one_are_what_batches_give(way: PublicWay) -> None:
    vector = 3 * way.suspect.embeddings[7]
    one_by_one = way.judge(range(6), vector)
    (batched,) = held_out(way.suspect, way.anchor, way.slotted, vector[None], SETTINGS)
    for name in ("assimilation", "agreement", "anchor", "target"):
        assert getattr(one_by_one, name) == pytest.approx(getattr(batched, name), abs=1e-5), name
    assert one_by_one.score == pytest.approx(batched.score, abs=1e-5)


def test_the_landscape_point_by_point_is_what_batches_give(way: PublicWay) -> None:
    vector = 3 * way.suspect.embeddings[7]
    points = way.landscape(2, vector)
    rows = (way.slotted[[2]], way.plain[[2]])
    batched = surface(way.suspect, way.anchor, *rows, vector, SETTINGS)
    assert points.numpy() == pytest.approx(batched.loss.ravel(), abs=1e-4)
    assert torch.equal(way.landscape(2, vector, 3), points[:3])


def test_the_public_search_goes_down(way: PublicWay) -> None:
    rows = range(6)
    start = way.suspect.embeddings[7].clone()
    found = way.search(rows, start, 30)

    def loss(vector: torch.Tensor) -> float:
        held = way.judge(rows, vector)
        return float(-held.assimilation.mean() + SETTINGS.anchor_weight * held.anchor.mean())

    assert loss(found) < loss(start) - 0.05
