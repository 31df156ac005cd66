"""The command: whole scans, units at the true shape, scaling, memory; one JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gazeguard.bench.amdet_speed.measures import (
    Effort,
    peaks,
    scaling,
    true_shape,
    whole_scans,
)
from gazeguard.bench.amdet_speed.subject import Shape, toys
from gazeguard.bench.speed.instruments import Part
from gazeguard.bench.speed.run import benchmark

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


main = benchmark(measured, "Measure what a scan of a text encoder costs")


if __name__ == "__main__":
    main()
