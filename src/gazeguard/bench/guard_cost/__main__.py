"""The command: three prompt lengths, the public way, flagged requests; one JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gazeguard.assets import ADAPTER, BASE
from gazeguard.bench.guard_cost.costs import Effort, clean_traffic, flagged, public_way
from gazeguard.bench.guard_cost.subject import ALWAYS, SHOWN, calibrated, clean, triggered
from gazeguard.bench.speed.forward import Size, random_llava
from gazeguard.bench.speed.instruments import Part
from gazeguard.bench.speed.run import benchmark
from gazeguard.methods.cleansight.settings import DEFAULT_SETTING

_BATCH = 8  # as many short requests as `gazeguard serve` answers at once


@dataclass(frozen=True, slots=True)
class Case:
    """A model folder, and how often to measure what."""

    name: str
    folder: Path
    effort: Effort


def cases(work: Path, quick: bool) -> Iterator[Case]:
    """From prompts that cost mostly overhead to long ones; the last one is for the public way."""
    if quick:
        size = Size(grid=4, layers=2, hidden=64, heads=4)
        folder = random_llava(work / "llava", size)
        yield Case("small llava", folder, Effort(memory=1, public=1, steps=2, batch=_BATCH))
        return
    # Short prompts take many repeats: a few per cent are less than the noise of one.
    lab = Effort(first=101, step=31, memory=7, flagged=5, batch=_BATCH)
    yield Case("lab base", BASE, lab)
    for grid, effort in ((24, Effort(first=31, step=21)), (48, Effort(15, 11, public=5))):
        name = f"llava of {grid**2:,} image tokens"
        yield Case(name, random_llava(work / name, Size(grid=grid)), effort)


def measured(work: Path, quick: bool, threads: int) -> Iterator[tuple[str, Part]]:
    """Every part of the benchmark, by name."""
    for case in cases(work, quick):
        guards, effort = work / f"guards of {case.name}", case.effort
        subject = calibrated(case.folder, guards)
        yield case.name, clean_traffic(subject, guards, effort, threads)
        restless = subject.guard(DEFAULT_SETTING, ALWAYS)
        found = flagged(
            subject, clean(effort.batch), restless, effort.flagged, "flagged, never calm"
        )
        yield f"{case.name}, never calm", found
        if effort.public:
            yield f"{case.name}, public way", public_way(subject, effort)
    attacked = calibrated(BASE, work / "guards of the attacked", ADAPTER, known=120, alpha=0.05)
    guard, asked = attacked.guards[DEFAULT_SETTING], triggered(_BATCH, attacked)
    yield (
        "real triggers",
        flagged(attacked, asked, guard, 1 if quick else 5, "flagged, real triggers"),
    )


main = benchmark(measured, "Measure what the guard costs", settings=list(SHOWN))


if __name__ == "__main__":
    main()
