"""`gazeguard bench table DIR`: a run as Markdown, as CSV and as one page of HTML.

The same cells give the same bytes: nothing in the files tells when they were made or how long a
cell took.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from gazeguard.bench.markdown import head, row
from gazeguard.bench.report import sections
from gazeguard.bench.report.conditions import EVERYTHING, Condition, Part, parts
from gazeguard.bench.report.quantities import METRICS
from gazeguard.bench.report.stored import Line, StoredRun, read_run
from gazeguard.errors import MissingExtra
from gazeguard.report.files import write_atomic

COLUMNS = (
    *("base", "attack", "label", "set", "truth", "level", "defence", "ours"),
    *("metric", "value", "low", "high", "runs", "n", "why"),
)


def write_tables(folder: Path) -> list[Path]:
    """Write `table.md`, `table.csv` and `table.html` into a run's folder.

    Args:
        folder: what `gazeguard bench run` has written, finished or not.

    Returns:
        The three files.

    Raises:
        UsageError: the folder holds no run, a file of it is broken, or it cannot be written to.
        MissingExtra: matplotlib is not installed.
    """
    try:
        from gazeguard.bench.report.page import render_html
    except ImportError as error:
        raise MissingExtra(error.name or "matplotlib", "bench", "Drawing a benchmark") from error
    run = read_run(folder)
    found = parts(run)
    texts = {
        "table.md": markdown(run, found),
        "table.csv": long_form(found),
        "table.html": render_html(run, found),
    }
    return [write_atomic(folder / name, text) for name, text in texts.items()]


def markdown(run: StoredRun, found: list[Part]) -> str:
    """The Markdown file's text."""
    lines = [f"# {_line(run.title)}", "", sections.what_was_run(run), ""]
    for title, table in sections.everything(run, found):
        lines += [f"## {title}", ""]
        if table.note:
            lines += [table.note, ""]
        lines += head(" | ".join(table.titles))
        lines += [row(_line(cell) for cell in cells) for cells in table.rows]
        lines.append("")
    lines += ["## How to read this", ""]
    lines += [f"- {sentence}" for sentence in sections.READING]
    return "\n".join(lines) + "\n"


def long_form(found: list[Part]) -> str:
    """The CSV file's text: a line per number; and a line with `why` per cell that lacks one."""
    stream = StringIO()
    out = csv.writer(stream, lineterminator="\n")
    out.writerow(COLUMNS)
    for part in found:
        out.writerows(_numbers(part))
        out.writerows(_missing(part))
    return stream.getvalue()


def _numbers(part: Part) -> Iterator[list[str]]:
    for condition in part.conditions:
        for line in part.defences:
            for metric in METRICS[part.level]:
                got = part.of(condition, line, metric.key)
                if got:
                    exact = [f"{x:.6f}" for x in (got.value, got.low, got.high)]
                    cells = [metric.key, *exact, str(got.runs), str(got.n), ""]
                    yield [*_place(part, condition, line), *cells]


def _missing(part: Part) -> Iterator[list[str]]:
    for each in part.missing:
        blank = ["" if each.what == EVERYTHING else each.what, "", "", "", str(each.models), ""]
        yield [*_place(part, each.condition, each.defence), *blank, each.why]


def _place(part: Part, condition: Condition, line: Line) -> list[str]:
    truth = "backdoored" if condition.backdoored else "benign"
    names = [condition.base, condition.attack, condition.label, condition.group]
    return [*names, truth, part.level, line.name, "yes" if line.ours else "no"]


def _line(text: str) -> str:
    """Text that cannot leave its cell, nor become HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
