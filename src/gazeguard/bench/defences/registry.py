"""What a defence is to the benchmark: one function of a made model, at one of three levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["data", "input", "model"]
LEVELS: tuple[Level, ...] = ("data", "input", "model")
KINDS = ("vlm", "encoder")


@dataclass(frozen=True, slots=True)
class Defence:
    """One line of the benchmark's tables.

    Attributes:
        name: as in suites and tables.
        level: `data`: an `Upload` -> which rows to remove, bools `(n,)`. `input`: a `Traffic` ->
            `Responses`. `model`: a `Suspect` -> `Judged`.
        run: the function.
        kind: of model that it takes, `vlm` or `encoder`.
        ours: False for a baseline, and for a paper's own setting of a method.
        about: one line, from the function's docstring.
    """

    name: str
    level: Level
    run: Callable[[Any], Any]
    kind: str
    ours: bool
    about: str


DEFENCES: dict[str, Defence] = {}
"""By name, filled by `defence`."""

Function = Callable[[Any], Any]


def defence(
    name: str, level: Level, *, kind: str = "vlm", ours: bool = False, about: str = ""
) -> Callable[[Function], Function]:
    """Register a function as a defence.

    Args:
        name: for suites and tables.
        level: as in `Defence`.
        kind: as in `Defence`.
        ours: as in `Defence`.
        about: instead of the first line of the function's docstring.

    Raises:
        ValueError: the name is taken, or there are no words about it.
    """

    def register(run: Function) -> Function:
        said = about or (run.__doc__ or "").strip().split("\n")[0]
        if name in DEFENCES or not said:
            raise ValueError(f"defence '{name}' needs a free name and a docstring")
        DEFENCES[name] = Defence(name, level, run, kind, ours, said)
        return run

    return register
