"""`gazeguard clean` as its users start it: a process of its own, with the shipped model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gazeguard.assets import ADAPTER, BASE

RESULTS = (
    "kept.parquet",
    "removed.parquet",
    "reasons.jsonl",
    "verdicts.parquet",
    "profile.parquet",
)
_FLAGGED = 1
_MAIN = "import sys; from gazeguard.cli.main import main; sys.argv[0] = 'gazeguard'; main()"


def start(data: Path, out: Path, options: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Clean `data` with the shipped base and its poisoned adapter, on one thread."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN, "clean", str(BASE), str(data), "--adapter"]
        + [str(ADAPTER), "--out", str(out), "--device", "cpu", *options],
        env=os.environ | dict.fromkeys(names, "1") | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> float:
    """Wait for the end; gives the rows/s that the command reports, of the rows that it measured.

    Raises:
        RuntimeError: it did not end with a verdict of poison.
    """
    _, said = process.communicate()
    text = said.decode()
    if process.returncode != _FLAGGED:
        raise RuntimeError(f"clean ended with {process.returncode}: {text[-2000:]}")
    return float(re.findall(r"([\d,.]+) rows/s", text)[-1].replace(",", ""))


def timed(data: Path, out: Path, options: Sequence[str] = ()) -> tuple[float, float]:
    """Wall seconds from the start of the command to its end, and its own rows/s."""
    began = time.perf_counter()
    rate = finish(start(data, out, options))
    return time.perf_counter() - began, rate


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two output folders hold the same results."""
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in RESULTS)
