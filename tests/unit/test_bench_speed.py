"""The speed benchmark runs at small sizes; its arithmetic and its scales are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gazeguard.bench.speed.__main__ import main
from gazeguard.bench.speed.instruments import MIB, Figure, Spread, interleave, peak_added, ratio


@pytest.mark.slow
def test_quick_run_measures_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "speed.json"
    done = CliRunner().invoke(main, ["--out", str(out), "--quick"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["quick"]
    assert {"cpu", "cores", "threads", "torch", "transformers", "commit"} <= set(result["machine"])
    assert len(result["figures"]) == 24
    memory_known = sys.platform == "linux"
    for figure in result["figures"]:
        assert figure["name"] in done.output, "the table leaves a figure out"
        assert figure["target"] == "-", "small sizes have no target to meet"
        if memory_known or "memory" not in figure["name"]:
            assert figure["value"]["low"] <= figure["value"]["median"] <= figure["value"]["high"]
            assert figure["value"]["median"] > 0


def test_turns_alternate_after_a_round_that_does_not_count() -> None:
    turns: list[str] = []
    seconds = interleave({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 2)
    assert turns == list("ababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_ratio_pairs_neighbours_so_that_drift_cancels() -> None:
    assert ratio([2.0, 4.0, 40.0], [1.0, 2.0, 20.0]) == Spread(2.0, 2.0, 2.0, 3)


@pytest.mark.parametrize(
    ("bounds", "median", "met"),
    [
        ({"at_most": 1.1}, 1.1, True),
        ({"at_most": 1.1}, 1.2, False),
        ({"at_least": 4}, 4.0, True),
        ({"at_least": 4}, 3.9, False),
        ({}, 1.0, None),
    ],
)
def test_a_figure_knows_whether_it_meets_its_target(
    bounds: dict[str, float], median: float, met: bool | None
) -> None:
    figure = Figure("figure", "x", Spread(median, median, median, 1), **bounds)
    assert figure.met is met
    assert figure.as_json()["met"] is met
    assert (", met" in figure.target, ", missed" in figure.target) == (met is True, met is False)


def test_unmeasured_is_neither_met_nor_missed() -> None:
    assert Figure("figure", "GB", None, at_most=1).met is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset its memory mark")
def test_peak_added_sees_memory_that_is_gone_again() -> None:
    np.ones(200 * MIB, np.uint8)  # an earlier, higher peak must not hide the next one
    found = peak_added(lambda: np.ones(50 * MIB, np.uint8).sum())
    assert found is not None
    assert 49 <= found / MIB <= 60, f"50 MiB were written, {found / MIB:.1f} MiB were seen"
