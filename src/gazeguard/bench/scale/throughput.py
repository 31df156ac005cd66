"""Rows per second of the whole command: alone, with one Ray worker, with two."""

from __future__ import annotations

from pathlib import Path

from gazeguard.bench.scale.command import timed
from gazeguard.bench.scale.sets import lab_set
from gazeguard.bench.speed.instruments import Figure, Part, Seconds, Spread, ratio

WAYS = {
    "one process": (),
    "Ray, 1 worker": ("--workers", "1", "--ray", "local"),
    "Ray, 2 workers": ("--workers", "2", "--ray", "local"),
}


def throughput(work: Path, rows: int, repeats: int) -> Part:
    """The three ways in turns over the same set; every process and worker has one thread."""
    data = lab_set(work / "set.parquet", rows)
    took: Seconds = {name: [] for name in WAYS}
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(repeats):
        for name, options in WAYS.items():
            seconds, rate = timed(data, work / f"{name} {turn}", options)
            took[name].append(seconds)
            rates[name].append(rate)
    alone, one, two = took.values()
    what = f"{rows:,} rows, start to end"
    figures = [
        Figure(f"clean, {name}, {what}", "rows/s", Spread.of([rows / s for s in spent]))
        for name, spent in took.items()
    ]
    _, one_rate, two_rate = rates.values()
    middle = "rows/s while rows are measured, as clean reports them"
    gain, whole, cost = ratio(two_rate, one_rate), ratio(one, two), ratio(one, alone)
    figures += [
        Figure(f"2 Ray workers / 1, {rows:,} rows: {middle}", "x", gain, at_least=1.8),
        Figure(f"2 Ray workers / 1, {what}: rows/s", "x", whole, at_least=1.8),
        Figure(f"1 Ray worker / one process, {what}: time", "x", cost, at_most=1.10),
    ]
    return figures, {"rows": rows, "seconds": took, "rates": rates}
