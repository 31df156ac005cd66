"""The command: every part, one JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gazeguard.bench.scale.cost import SIZES, foretold
from gazeguard.bench.scale.formats import formats
from gazeguard.bench.scale.kills import kills
from gazeguard.bench.scale.memory import memory
from gazeguard.bench.scale.stage import stage
from gazeguard.bench.scale.throughput import throughput
from gazeguard.bench.speed.forward import Size
from gazeguard.bench.speed.instruments import Part
from gazeguard.bench.speed.run import benchmark


def measured(work: Path, quick: bool, threads: int) -> Iterator[tuple[str, Part]]:
    """Every part of the benchmark, by name."""
    small = Size(grid=4, layers=2, hidden=64, heads=4)
    yield "model stage, lab base", stage(work / "a", 40 if quick else 400, 1 if quick else 7, None)
    size, rows = (small, 4) if quick else (Size(), 12)
    yield "model stage, long prompts", stage(work / "b", rows, 1 if quick else 5, size)
    few = 1 if quick else 5
    yield "formats, lab base", formats(work / "d", 20 if quick else 200, few, None, not quick)
    yield "formats, long prompts", formats(work / "e", rows, few, size, not quick)
    sizes = (small, replace(small, layers=3)) if quick else SIZES
    yield "arithmetic", foretold(work / "c", 2 if quick else 8, 1 if quick else 5, sizes)
    few, many = (300, 900) if quick else (20_000, 200_000)
    yield "memory", memory(work / "memory", few, many, threads)
    if quick:  # the rest is minutes whatever the size; tests/integration/test_clean_ray.py
        return
    yield "kills", kills(work / "kills", 3_000, drivers=5, workers=10)
    yield "throughput", throughput(work / "rows", 20_000, 1)


main = benchmark(measured, "Measure clean at scale")


if __name__ == "__main__":
    main()
