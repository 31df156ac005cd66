"""Stored results as lines of Markdown tables, and the gate that an attack must pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from gazeguard.bench.metrics import mean_interval

Result = dict[str, Any]

ASR_GATE, CP_GATE = 0.95, 0.03


def attack_took(result: Result) -> bool:
    """Both quality gates of an attack."""
    attack = result["attack"]
    close = attack["clean"] >= result["truly_clean"] - CP_GATE
    return bool(attack["asr"] >= ASR_GATE and close)


def by(results: list[Result], key: Callable[[Result], Any]) -> list[tuple[Any, list[Result]]]:
    """Results with the same key together, in the keys' order."""
    groups: dict[Any, list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return sorted(groups.items())


def mean(values: Iterable[float]) -> str:
    """Mean and half of its 95 % t interval over runs; a dash for no run."""
    numbers = list(values)
    if not numbers:
        return "-"
    middle, half = mean_interval(numbers)
    return f"{middle:.3f}" if len(numbers) < 2 else f"{middle:.3f} ± {half:.3f}"


def interval(found: dict[str, float]) -> str:
    """A `value` and its interval from `low` to `high`."""
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def head(titles: str) -> list[str]:
    """The first two lines of a table; `titles` as in `a | b | c`."""
    return [f"| {titles} |", "|" + "---|" * (titles.count("|") + 1)]


def figures(measured: Result, module: str) -> str:
    """What a benchmark of time and memory measured, and on which machine."""
    machine = measured["machine"]
    words = ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None)
    lines = [f"One run of `python -m gazeguard.bench.{module}` ({words}).\n"]
    lines += head("figure | value | target")
    lines += [row([f["name"], f["text"], f["target"]]) for f in measured["figures"]]
    return "\n".join(lines) + "\n"


def row(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"
