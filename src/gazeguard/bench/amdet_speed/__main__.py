"""The command: whole scans, units at the true shape, scaling, memory; one JSON file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from gazeguard.bench.amdet_speed.measures import (
    Effort,
    Part,
    peaks,
    scaling,
    true_shape,
    whole_scans,
)
from gazeguard.bench.amdet_speed.subject import Shape, toys
from gazeguard.bench.speed.run import Run

_FILE = click.Path(dir_okay=False, path_type=Path)
_QUICK = Effort(
    prompts=120, points=4, repeats=1, counts=(120, 150), restarts=(2,), widths=(64,), memory=1
)
_SMALL = Shape(width=64, layers=2, heads=4, vocabulary=2000, length=24)


def measured(work: Path, quick: bool, threads: int) -> Iterator[tuple[str, Part]]:
    """Every part of the benchmark, by name."""
    effort, shape = (_QUICK, _SMALL) if quick else (Effort(), Shape())
    yield "whole scans", whole_scans(toys(work, quick), effort)
    yield "true shape", true_shape(shape, effort)
    yield "scaling", scaling(effort, shape.layers)
    yield "memory", peaks(shape, effort, threads)


@click.command()
@click.option("--out", type=_FILE, required=True, help="JSON file to write.")
@click.option("--quick", is_flag=True, help="Small sizes, in seconds: for tests, not for figures.")
@click.option("--threads", default=1, type=click.IntRange(1), show_default=True)
def main(out: Path, quick: bool, threads: int) -> None:
    """Measure what a scan of a text encoder costs, print a table, write the numbers as JSON."""
    run = Run(quick, threads)
    with tempfile.TemporaryDirectory() as work:
        for name, part in measured(Path(work), quick, threads):
            run.add(name, part)
    run.finish(out)


if __name__ == "__main__":
    main()
