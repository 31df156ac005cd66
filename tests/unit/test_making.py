"""References that the tool makes: which distances, found again by what, made again when."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from gazeguard.models.difference import Difference
from gazeguard.scanning import making
from gazeguard.scanning.making import ReferenceMaker
from gazeguard.scanning.subject import Subject
from gazeguard.tuning import Made, Recipe, kept, recipes
from gazeguard.tuning.references import suspect_config

WIDTH = 128
ADAPTER = Difference("adapter", ("lora",), 9)
distances = st.floats(1e-3, 1e4)


@given(distances, st.integers(1, 40))
def test_references_move_about_as_far_as_the_suspect_and_a_longer_list_begins_with_the_shorter(
    distance: float, count: int
):
    plans = recipes(count, WIDTH, distance)
    assert all(0.649 <= plan.distance / distance <= 1.301 for plan in plans)
    assert len({(plan.lr, plan.seed) for plan in plans}) == count
    assert recipes(count + 7, WIDTH, distance)[:count] == plans


@given(distances, st.floats(1.0, 1.3))
def test_suspects_that_moved_almost_as_far_share_most_references(distance: float, further: float):
    one, other = (set(recipes(20, WIDTH, far)) for far in (distance, distance * further))
    # A tenth of a doubling apart, two of twenty are others.
    missing = 2 * (1 + int(10 * (further - 1) / 0.6931))
    assert len(one & other) >= 20 - missing
    if further == 1.0:
        assert one == other


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReferenceMaker:
    """A maker whose references move a hundredth of their way in each step; nothing is loaded."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    width = SimpleNamespace(decoder=SimpleNamespace(config=SimpleNamespace(hidden_size=WIDTH)))
    monkeypatch.setattr(Subject, "load", lambda *_: width)
    monkeypatch.setattr(ReferenceMaker, "_taught", lambda *_: [])

    def tuned(
        base: Any,
        config: Any,
        rows: Any,
        answers: Any,
        plan: Recipe,
        out: Path,
        steps: int,
        tell: Any,
    ) -> Made:
        done = min(steps, 100)
        far = plan.distance * done / 100
        tell(done, far)
        out.mkdir(exist_ok=True)
        (out / "recipe.json").write_text(json.dumps({"steps": done, "moved": far}))
        made = kept(out, plan)
        assert made is not None
        told.append(out.name)
        return made

    told: list[str] = []
    monkeypatch.setattr(making, "make_reference", tuned)
    found = ReferenceMaker(
        Subject("base", base), 19, Rows("rows"), tmp_path, 2000, "float32", "cpu"
    )
    found.told = told
    return found


class Rows(list):
    """Rows of some content."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint


def suspect(folder: Path, **changed: Any) -> Subject:
    """An adapter's configuration, as one trainer or another writes it."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changed}
    LoraConfig(**settings).save_pretrained(folder)
    return Subject(folder.name, folder.parent / "base", folder)


def test_a_suspect_of_the_same_kind_and_distance_finds_all_of_them(
    maker: ReferenceMaker, tmp_path: Path
):
    first = maker(suspect(tmp_path / "one"), ADAPTER, 5.0)
    assert len(maker.told) == len(set(maker.told)) == 19
    other = suspect(
        tmp_path / "two",
        base_model_name_or_path="elsewhere/base",
        task_type=None,
        target_modules=["v_proj", "q_proj"],
        revision="main",
    )
    assert [one.adapter for one in maker(other, ADAPTER, 5.0)] == [one.adapter for one in first]
    assert len(maker.told) == 19
    maker(other, ADAPTER, 5.4)
    assert len(maker.told) <= 19 + 4, "one that moved further by 8 % needs a few more"


def test_another_kind_base_or_lesson_is_another_place(maker: ReferenceMaker, tmp_path: Path):
    plan, further = recipes(2, WIDTH, 5.0)

    def place(plan: Recipe = plan, **changed: Any) -> Path:
        return maker.place(suspect_config(suspect(tmp_path / "s", **changed).adapter), plan)

    places = [
        place(),
        place(further),
        place(r=8),
        place(target_modules=["q_proj"]),
        place(modules_to_save=["multi_modal_projector"]),
    ]
    maker.rows = Rows("others")
    places.append(place())
    (tmp_path / "base" / "config.json").write_text('{"other": 1}')
    places.append(place())
    assert len(set(places)) == 7


def test_those_that_were_cut_off_are_told_of_and_made_again_with_more_steps_only(
    maker: ReferenceMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shown: list[tuple[str, int, int]] = []
    maker.steps, maker.progress = 12, lambda *step: shown.append(step)
    one = suspect(tmp_path / "one")
    with caplog.at_level(logging.WARNING, "gazeguard.scan"):
        maker(one, ADAPTER, 16.0)
    assert "19 of 19 made references were cut off after 12 steps" in caplog.text
    assert "12 % to 12 % of their way: raise --reference-steps" in caplog.text
    assert shown[0] == ("reference 1 of 19, moved 1.92 of 16, steps", 12, 12)
    maker(one, ADAPTER, 16.0)
    assert len(maker.told) == 19
    maker.steps = 1000
    caplog.clear()
    maker(one, ADAPTER, 16.0)
    assert len(maker.told) == 38
    assert "cut off" not in caplog.text
    maker.steps = 12
    maker(one, ADAPTER, 16.0)
    assert len(maker.told) == 38, "the limit is no part of what a reference is"


def test_a_damaged_one_is_made_again(maker: ReferenceMaker, tmp_path: Path):
    one = suspect(tmp_path / "one")
    first = maker(one, ADAPTER, 5.0)
    (first[3].adapter / "recipe.json").write_text('{"steps"')
    maker(one, ADAPTER, 5.0)
    assert len(maker.told) == 20
