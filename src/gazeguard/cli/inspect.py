"""`gazeguard inspect`: how the rows of a set will be read, before a model runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import click

from gazeguard.cli import _errors
from gazeguard.cli._options import column_options, format_option, images_option

if TYPE_CHECKING:
    from gazeguard.data.columns import Columns
    from gazeguard.data.dataset import Dataset
    from gazeguard.data.inspection import Inspection

_SHAPES = 8  # shown to a person; a set with more is no set of one kind
_WIDTH = 96


@click.command(epilog="Exit codes: 0 readable, 2 error, 3 too much cannot be used.")
@click.argument("data", type=click.Path(path_type=Path))
@images_option
@format_option
@column_options
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Look only at the first N rows.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.pass_context
def inspect(
    ctx: click.Context,
    data: Path,
    images: Path | None,
    format: str,
    columns: Columns,
    limit: int | None,
    as_json: bool,
) -> None:
    """Show how `gazeguard clean` will read the rows of DATA; loads no model.

    For every set of columns an example, what is not read, why rows are skipped, and answers and
    pictures that occur more than once.
    """
    from gazeguard.data.inspection import Inspection
    from gazeguard.data.read import open_dataset

    dataset = open_dataset(data, images=images, format=format, columns=columns, need_answer=True)
    found = Inspection()
    total = min(dataset.count(), limit or dataset.count())
    threads = min(8, os.cpu_count() or 1)
    with click.progressbar(
        dataset.readings(within=range(total), threads=threads),
        length=total,
        label="Reading rows",
        file=sys.stderr,
        hidden=not sys.stderr.isatty(),
    ) as readings:
        for reading in readings:
            found.add(reading)
    usable = found.survey.is_enough
    if as_json:
        start = {"path": str(dataset.path), "format": dataset.format, "usable": usable}
        click.echo(json.dumps(start | found.as_json(), indent=1))
    else:
        for line in _lines(dataset, found):
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            click.echo(fill(line, _WIDTH, subsequent_indent=indent, break_on_hyphens=False))
    ctx.exit(_errors.CLEAN if usable else _errors.INCONCLUSIVE)


def _lines(dataset: Dataset, found: Inspection) -> Iterator[str]:
    survey = found.survey
    # Of the rows that were looked at, whose pictures are decoded here.
    yield f"{dataset.path} ({dataset.format}): {survey.sentence()}"
    for shape in list(found.shapes.values())[:_SHAPES]:
        yield ""
        yield _line(f"{_rows(shape.rows)} with {', '.join(shape.keys) or 'no keys'}")
        if shape.example is not None:
            yield _line(f"  row {shape.example['row']}, as it is read:")
            for name in ("prompt", "answer"):
                yield _line(f"  {name:<9} {shape.example[name] or '(none)'}")
            yield _line(f"  turns     {', '.join(shape.example['turns'])}")
            yield _line(f"  pictures  {', '.join(shape.example['pictures'])}")
        if shape.ignored:
            columns = (f"{name} ({_rows(rows)})" for name, rows in shape.ignored.most_common())
            yield _line(f"  not read  {', '.join(columns)}")
    if len(found.shapes) > _SHAPES:
        yield ""
        yield f"{len(found.shapes) - _SHAPES:,} more sets of keys: see --json."
    for kind, count in survey.skipped.most_common():
        yield ""
        yield f"Skipped, {kind}: {_rows(count)}"
        for reason in found.reasons.values():
            if reason.kind is kind:
                more = f" (and {reason.rows - 1:,} more)" if reason.rows > 1 else ""
                yield f"  row {reason.first.row}{more}: {reason.first.reason}"
    yield ""
    yield f"Answers that an earlier row has too: {_rows(found.repeated)}"
    for text, count in found.most_repeated():
        yield _line(f"  {count:,} x {text}")
    yield f"Pictures that an earlier row has too: {_rows(found.same_picture)}"
    if found.contradicting:
        pairs = ", ".join(f"{one} and {other}" for one, other in found.examples)
        yield (
            f"  with the same question and another answer: {_rows(found.contradicting)}"
            f" (such as {pairs})"
        )
    if not survey.is_enough:
        yield ""
        yield survey.complaint()


def _rows(count: int) -> str:
    from gazeguard.data.survey import counted

    return counted(count, "row")


def _line(text: str) -> str:
    """One line and no more, for words of strangers."""
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
