from __future__ import annotations

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from gazeguard.report.console import render_console
from gazeguard.report.html import render_html
from gazeguard.report.model import CleanReport
from gazeguard.types import NearMiss, Outcome
from tests.unit.report_fixture import make_report


def shown(report: CleanReport, width: int = 100) -> str:
    stream = StringIO()
    Console(file=stream, no_color=True, width=width, legacy_windows=False).print(
        render_console(report)
    )
    return stream.getvalue()


def test_summary_of_a_flagged_set_says_everything_without_colour() -> None:
    text = shown(make_report())
    assert " ".join(text.split()).startswith(
        "150 of 1,500 rows look poisoned and were removed; 12 of 1,500 rows with pictures were not"
        " looked at (picture not found: 4, picture cannot be read: 4, row cannot be read: 4)."
    )
    assert "1,500 read: 1,338 kept, 150 removed (10.0 %), 12 skipped" in text
    assert "2 of 6 used (0, 1); strongest separation 6.60 in layer 0" in text
    assert "kept.json" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("outcome", "first"),
    [
        (Outcome.CLEAN, "No sign of poisoning: nothing was removed;"),
        (Outcome.INCONCLUSIVE, "Could not decide: 12 rows could be measured"),
    ],
)
def test_first_line_is_the_verdict(outcome: Outcome, first: str) -> None:
    text = shown(make_report(outcome))
    assert text.startswith(first)
    assert "none of 6 used" in text


def test_the_reason_is_not_said_twice() -> None:
    text = shown(make_report(Outcome.CLEAN))
    assert text.count("No sign of poisoning") == 1
    assert "The rows form one group (separation 0.92, 2 is needed)." in text


def test_brackets_in_paths_are_text_not_markup() -> None:
    report = make_report(n=60, poisoned=6)
    files = {"kept": "out/[bold]run[/bold]/kept.json"}
    object.__setattr__(report, "files", files)
    assert "[bold]run[/bold]" in shown(report)


def test_rows_with_the_targets_words_are_named() -> None:
    report = make_report(skipped=0)
    kept, gone = int(np.argmin(report.result.is_flagged)), int(np.argmax(report.result.is_flagged))
    report.result.near_misses = (NearMiss(kept, "hello"), NearMiss(gone, "hello"))
    text = shown(report)
    assert f"1 row kept, though the answer says “hello”: {report.rows[kept]:,}" in text
    assert f"1 row removed, as the answer says “hello”: {report.rows[gone]:,}" in text
    page = render_html(report)
    assert "Rows with the same words" in page
    assert "Removed with their group: 1 row" in page


def test_rows_without_a_picture_and_after_the_limit_are_counted_apart() -> None:
    report = make_report(Outcome.CLEAN, skipped=0)
    counts = {**report.counts, "text_only": 30}
    text = " ".join(shown(replace(report, counts=counts, beyond=1200)).split())
    assert "30 kept: no picture, not judged" in text
    assert "nothing was removed; 1,200 rows after the limit not looked at and in no file." in text


def test_reasons_of_skipped_rows_are_counted() -> None:
    assert "4: The row has no image." in shown(make_report())


def test_narrow_terminals_lose_nothing() -> None:
    assert "verdicts.parquet" in shown(make_report(), width=40).replace("\n", "")


def test_a_row_with_several_answers_is_named_with_the_turn() -> None:
    report = make_report()
    rows, turns = report.rows.copy(), report.turns.copy()
    rows[1], turns[1] = rows[0], 2
    turns[5] = 3  # the answers before it had no picture to look at
    report = replace(report, rows=rows, turns=turns)
    names = [report.name(place) for place in (0, 1, 2, 5)]
    first, third, sixth = (f"{rows[place]:,}" for place in (0, 2, 5))
    assert names == [f"{first}, turn 1", f"{first}, turn 2", third, f"{sixth}, turn 3"]
    result = replace(
        report.result, near_misses=(NearMiss(1, "hello"),), is_flagged=np.arange(len(rows)) > 1
    )
    assert f"“hello”: {first}, turn 2" in shown(replace(report, result=result))
