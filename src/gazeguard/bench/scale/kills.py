"""Runs whose driver or workers are killed, against runs that nobody disturbs."""

from __future__ import annotations

import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from gazeguard.bench.scale.command import finish, same_bytes, start, timed
from gazeguard.bench.scale.sets import SEED, lab_set
from gazeguard.bench.speed.instruments import Figure, Part, Spread

_RAY = ("--workers", "2", "--ray", "local")
_BETWEEN = 3.0  # seconds between two kills of workers, at least
_WORKER = "ray::Worker"  # what Ray calls the process of an actor of that class


def kills(work: Path, rows: int, drivers: int, workers: int) -> Part:
    """Kill, run again, compare bytes."""
    data = lab_set(work / "set.parquet", rows)
    rng = random.Random(SEED)
    usual, _ = timed(data, work / "whole")
    # Each run goes on where the last one died: early moments leave rows for all of them.
    moments = [rng.uniform(0.05, 0.35) * usual for _ in range(drivers)]
    killed = sum(_kill_driver(data, work / "killed", moment) for moment in moments)
    finish(start(data, work / "killed"))
    timed(data, work / "ray", _RAY)
    died = _kill_workers(data, work / "ray killed", workers, rng)
    same = {
        "driver": same_bytes(work / "killed", work / "whole"),
        "workers": same_bytes(work / "ray killed", work / "ray"),
    }
    figures = [
        Figure(
            f"{killed} kills of the driver, {died} of workers, {rows:,} rows: runs with the bytes"
            " of an undisturbed one, of 2",
            "runs",
            Spread.of([float(sum(same.values()))]),
            at_least=2,
        )
    ]
    return figures, {"moments": moments, "drivers": killed, "workers": died, "same_bytes": same}


def _kill_driver(data: Path, out: Path, moment: float) -> bool:
    """Whether the run was still going on."""
    process = start(data, out)
    time.sleep(moment)
    going = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return going


def _kill_workers(data: Path, out: Path, times: int, rng: random.Random) -> int:
    """Kill workers that are at work, one at a time; gives how many were."""
    process, died = start(data, out, _RAY), 0
    while died < times and process.poll() is None:
        time.sleep(_BETWEEN)
        busy = _workers()
        if busy:
            with suppress(psutil.NoSuchProcess):
                rng.choice(busy).kill()
                died += 1
    finish(process)
    return died


def _workers() -> list[psutil.Process]:
    """Processes of workers that measure rows at this moment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if words.startswith(_WORKER) and ".measure" in words:
            found.append(process)
    return found
