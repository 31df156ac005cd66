"""Clocks and scales: interleaved timing, peak memory of one call, and what machine it was."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

MIB = 2**20
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of `n` repeats, with their range (or, where its maker says so, an interval)."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the benchmark, with the target it has to meet, if any.

    `at_most` and `at_least` bound the median. `value` is None where it could not be measured.
    """

    name: str
    unit: str
    value: Spread | None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median is within the bound; None without a bound or a value."""
        if self.value is None:
            return None
        if self.at_most is not None:
            return self.value.median <= self.at_most
        return None if self.at_least is None else self.value.median >= self.at_least

    @property
    def text(self) -> str:
        """Median, range and number of repeats in words."""
        if (v := self.value) is None:
            return "not measurable here"
        if v.n == 1:
            return f"{v.median:.3g} {self.unit} (once)"
        return f"{v.median:.3g} {self.unit} ({v.low:.3g} to {v.high:.3g}, n = {v.n})"

    @property
    def target(self) -> str:
        """The bound and whether it is met, in words; `-` without a bound."""
        verdict = {True: ", met", False: ", missed", None: ""}[self.met]
        if self.at_most is not None:
            return f"<= {self.at_most:g}{verdict}"
        return "-" if self.at_least is None else f">= {self.at_least:g}{verdict}"

    def as_json(self) -> dict[str, Any]:
        """The figure, in numbers and in words, as JSON types."""
        return {**asdict(self), "met": self.met, "text": self.text, "target": self.target}


Part = tuple[list[Figure], dict[str, Any]]
"""What one part of a benchmark found: its figures, and the numbers they were made of."""

Seconds = dict[str, list[float]]


def interleave(variants: Mapping[str, Callable[[], object]], repeats: int) -> Seconds:
    """Time variants in turns (A B A B ...), so that a drift of the machine hits all alike.

    Returns:
        Wall seconds per variant, one per repeat. One more round before these is thrown away: it
        pays for lazy set-up and cold caches.
    """
    seconds: Seconds = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Spread of the ratios of neighbours in time."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def peak_added(run: Callable[[], object]) -> int | None:
    """Bytes by which `run` raises the process's resident memory at its highest moment.

    Why resident memory and not torch's own allocation records: it is what kills a process, and it
    holds kernels' scratch buffers too. `ru_maxrss` alone would show the import of torch or the
    loading of weights, which lies higher than a forward pass; Linux can reset its high-water mark
    (`proc(5)`, clear_refs), so the mark after `run` belongs to `run`. Free pages that malloc
    still holds are given back first, or `run` would use them without being charged. Call `run`
    once before, so that one-time set-up is not charged.

    Returns:
        None where the operating system has no resettable mark.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except OSError:
        return None
    run()
    return _resident("VmHWM") - before


def peaks_in_turns(
    runs: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Added peaks in MiB, in turns, after each ran once; empty where the system does not tell."""
    for run in runs.values():
        run()
    peaks: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            peak = peak_added(run)
            peaks[name] += [] if peak is None else [peak / MIB]
    return peaks


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def in_child(module: str, arguments: Mapping[str, Any], threads: int) -> Any:
    """Run `python -m module` with JSON arguments in a process of its own; its JSON answer.

    malloc gives every block of 64 KiB or more straight back to the system there, so the peak of a
    call is the sum of what is alive and not an accident of earlier calls.
    """
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(2**16),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **dict.fromkeys(_THREADS, str(threads)),
    }
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def public_maps(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Whole attention maps of the prompt, `(sample, head, query, key)` per layer.

    As published code gets them: `generate` of one token, `output_attentions`, eager attention.
    """
    return model.generate(
        **inputs,
        max_new_tokens=1,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    ).attentions[0]


def machine(threads: int) -> dict[str, Any]:
    """What ran the benchmark, without names of hosts, people or folders."""
    from gazeguard.provenance import package_versions

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": f"{sys.platform} {platform.machine()}",
        "python": platform.python_version(),
        **package_versions(("torch", "transformers", "numpy", "scikit-learn")),
        "commit": _commit(),
    }


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str | None:
    """The checked-out commit, `+changes` when files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
