"""The benchmark's command: five kinds of measurements, one table, one JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gazeguard.assets import ADAPTER, BASE
from gazeguard.bench.speed import fitting, forward, questions, workflow
from gazeguard.bench.speed.forward import Size, random_llava
from gazeguard.bench.speed.instruments import Part
from gazeguard.bench.speed.questions import GRIDS
from gazeguard.bench.speed.run import benchmark
from gazeguard.lab import tiny
from gazeguard.lab.poison import make_set, write_set

QUICK = Size(4, 2, 64, 4, (40, 160), batch=2, repeats=1, maps_repeats=1, memory_repeats=1)


@dataclass(frozen=True, slots=True)
class Case:
    """A model folder and a number of rows to take through it in both ways."""

    name: str
    folder: Path
    work: Path
    rows: int
    repeats: int
    adapter: Path | None = None


def cases(work: Path, random: Path, size: Size, quick: bool) -> Iterator[Case]:
    """From prompts that cost mostly overhead to prompts whose maps cost more than the model."""
    rows, repeats = (60, 1) if quick else (300, 3)
    if BASE.is_dir():
        yield Case("lab base", BASE, work / "base", rows, repeats)
        yield Case("lab base + adapter", BASE, work / "adapter", rows, repeats, ADAPTER)
    else:
        folder = tiny.build("llava", work / "tiny")
        yield Case("tiny llava", folder, work / "a", rows, repeats)
    if quick:
        return
    # Short turns: on a busy machine, long ones meet different neighbours.
    yield Case(f"llava of {size.grid**2} image tokens", random, work / "b", 50, 3)
    # Half the layers and few rows: the public way takes seconds a row here.
    fine = replace(size, grid=2 * size.grid, layers=size.layers // 2)
    folder = random_llava(work / "fine", fine)
    yield Case(f"llava of {fine.grid**2:,} image tokens", folder, work / "c", 12, 3)


def measured(work: Path, quick: bool, threads: int) -> Iterator[tuple[str, Part]]:
    """Every part of the benchmark, by name."""
    size = QUICK if quick else Size()
    random = random_llava(work / "llava", size)
    yield "forward", forward.measure(random, size, threads)
    yield "questions", questions.measure(work / "questions", size, (4,) if quick else GRIDS)
    for case in cases(work, random, size, quick):
        data = write_set(make_set("mixed", case.rows, "badnet-center", 0.1, 0), case.work)
        yield (
            case.name,
            workflow.measure(case.name, case.folder, data, case.work, case.repeats, case.adapter),
        )
    yield "fitting", fitting.measure(300 if quick else 100_000, 2 if quick else 32)


main = benchmark(measured, "Measure speed and memory")


if __name__ == "__main__":
    main()
