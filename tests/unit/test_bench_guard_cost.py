"""The cost benchmark runs at small sizes; its arithmetic is right; its table is in the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gazeguard.assets import BASE
from gazeguard.bench.guard_cost import start
from gazeguard.bench.guard_cost.__main__ import main
from gazeguard.bench.guard_cost.costs import Clock, paired, step_seconds
from gazeguard.bench.guard_cost.subject import ALWAYS, NEVER, SHOWN, calibrated, check, clean
from gazeguard.bench.speed.instruments import Spread
from gazeguard.bench.tables import page
from gazeguard.types import Outcome
from tests.unit.test_bench_tables import RUN


@pytest.mark.slow
def test_quick_run_measures_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "cost.json"
    done = CliRunner().invoke(main, ["--out", str(out), "--quick"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["quick"]
    assert result["settings"] == list(SHOWN)
    # Two plain figures, three per setting, flagged twice, the public way.
    assert len(result["figures"]) == 2 + 3 * len(SHOWN) + 2 + 1
    for figure in result["figures"]:
        assert figure["name"] in done.output, "the table leaves a figure out"
        assert figure["target"] == "-", "one repeat has no target to meet"
        if sys.platform == "linux" or "memory" not in figure["name"]:
            assert figure["value"]["median"] > 0
    for part in ("small llava, never calm", "real triggers"):
        assert result["raw"][part]["passes"] > 1, "a flagged prompt is read again"
    text = page([RUN], single={"guard_cost": result})
    assert all(f"| {f['name']} | {f['text']} |" in text for f in result["figures"])
    assert "`python -m gazeguard.bench.guard_cost`" in text
    assert "What the guard costs" not in page([RUN])


def test_a_step_is_counted_from_the_first_token() -> None:
    # Prompt at 0, a slow first token at 5, steps of 1, 1, and one that a neighbour disturbed.
    assert step_seconds([0.0, 5.0, 6.0, 7.0, 17.0]) == 1.0


def test_the_clock_marks_the_prompt_and_each_token() -> None:
    clock = Clock()
    for _ in range(3):
        clock.put(object())
    clock.end()
    assert len(clock.marks) == 3
    assert clock.marks == sorted(clock.marks)


def test_the_interval_is_that_of_the_median() -> None:
    # Of nine values the 2nd and the 8th enclose the median at 96 %; ranks 3 and 7 do at 82 %.
    ratios = [1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 9.0]
    speed = [2.0**k for k in range(9)]  # a drift that pairs cancel
    above = [r * s for r, s in zip(ratios, speed, strict=True)]
    found = paired(above, speed)
    assert (found.median, found.low, found.high) == pytest.approx((1.5, 1.2, 1.8))
    assert found.n == 9


def test_few_pairs_give_their_range() -> None:
    assert paired([1.0, 4.0, 3.0], [1.0, 2.0, 1.0]) == Spread(2.0, 1.0, 3.0, 3)


def test_nothing_is_timed_that_is_not_what_it_is_called(
    tmp_path: Path,
) -> None:
    subject = calibrated(BASE, tmp_path)
    inputs = subject.target.encode(clean(2)).inputs
    calm, alarmed = (subject.guard(SHOWN[0], threshold) for threshold in (NEVER, ALWAYS))
    assert len(check(subject.target, inputs, calm, Outcome.CLEAN)) == 2
    check(subject.target, inputs, alarmed, Outcome.FLAGGED)
    with pytest.raises(AssertionError, match="flagged"):
        check(subject.target, inputs, alarmed, Outcome.CLEAN)
    with pytest.raises(AssertionError, match="clean"):
        check(subject.target, inputs, calm, Outcome.FLAGGED)
    assert subject.guards[SHOWN[0]].threshold < NEVER, "the guard itself keeps its threshold"


@pytest.mark.slow
def test_the_start_is_measured_in_processes_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "start.json"
    done = CliRunner().invoke(start.main, ["--out", str(out), "--quick"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    (run,) = result["raw"]["start"]["seconds"]
    seconds, of_load, of_start = (figure["value"]["median"] for figure in result["figures"])
    assert seconds == run["check"] > 0
    assert of_load == run["check"] / run["load"]
    assert of_start == run["check"] / (run["load"] + run["import"])
