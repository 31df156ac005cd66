"""A benchmark run as it lies in its folder: `suite.json`, and one JSON file per filled cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from gazeguard.bench.report.quantities import KINDS, METRICS
from gazeguard.bench.report.results import Result, parse
from gazeguard.errors import UsageError

SUITE = "suite.json"
NOT_RUN = "not run yet"
NOTHING = "nothing"  # that a recipe without a disguise hides
TRUTHS = ("benign", "backdoored")


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the suite, the truth about it, and whether its attack passed the gates.

    Attributes:
        attack: the attack's name, `none` for a benign model.
        label, group: what the tables call it; models that share both and `base` are the runs
            (seeds) of one condition.
        clean, asr: shares of `n` held-out rows, None where there is no such number.
        why: why it did not pass, or None.
        recipe: how it was made, as the suite has it.
    """

    name: str
    base: str
    kind: str
    truth: str
    attack: str
    label: str
    group: str
    passed: bool
    clean: float | None
    asr: float | None
    n: int | None
    why: str | None
    recipe: Mapping[str, Any]

    @property
    def adaptive(self) -> bool:
        """Whether the attacker hid from a defence."""
        return bool(self.recipe.get("adaptive")) or self.recipe.get("hide", NOTHING) != NOTHING


@dataclass(frozen=True, slots=True)
class Line:
    """A defence as the suite lists it; see `defences.registry.Defence`."""

    name: str
    level: str
    ours: bool
    about: str


@dataclass(frozen=True, slots=True)
class Cell:
    """What a defence did to a model, or why there is nothing: exactly one of the two is None."""

    result: Result | None
    why: str | None


@dataclass(frozen=True, slots=True)
class Published:
    """A figure that a paper gives, in the units of our metric of the same name."""

    defence: str
    attack: str
    metric: str
    value: float
    where: str


@dataclass(frozen=True, slots=True)
class StoredRun:
    """Everything that the tables are made of, in the suite's order.

    Attributes:
        cells: by the names of model and defence.
        commits, machines: every one that a cell was made at, sorted.
    """

    name: str
    title: str
    models: tuple[Model, ...]
    defences: tuple[Line, ...]
    cells: Mapping[tuple[str, str], Cell]
    published: tuple[Published, ...]
    commits: tuple[str, ...]
    machines: tuple[str, ...]


def read_run(folder: Path) -> StoredRun:
    """Read a run, finished or not.

    Raises:
        UsageError: the folder holds no run, or a file of it is not what the benchmark writes.
    """
    path = folder / SUITE
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no benchmark run, there is no {SUITE} in it: give the folder that"
            " `gazeguard bench run SUITE --out DIR` has written."
        )
    cure = "run the suite again into the same folder"
    suite = _json(path, cure)
    try:
        models = tuple(_made(Model, each) for each in suite["models"])
        defences = tuple(_made(Line, each) for each in suite["defences"])
        published = tuple(_made(Published, each) for each in suite["published"])
        _check(models, defences, published)
        levels = {line.name: line.level for line in defences}
        known = {model.name for model in models}
        read = [
            _cell(folder, each, levels[each["defence"]])
            for each in suite["cells"]
            if each["model"] in known or _unknown(each["model"])
        ]
        name, title = str(suite["name"]), str(suite["title"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise _broken(path, error, cure) from error
    made = [found for _, _, found in read if found]
    return StoredRun(
        name,
        title,
        models,
        defences,
        {key: cell for key, cell, _ in read},
        published,
        tuple(sorted({str(found["commit"]) for found in made})),
        tuple(sorted({_in_words(found["machine"]) for found in made})),
    )


def _cell(
    folder: Path, listed: Mapping[str, Any], level: str
) -> tuple[tuple[str, str], Cell, Mapping[str, Any] | None]:
    """A cell's place, its content, and where that was made."""
    key = (str(listed["model"]), str(listed["defence"]))
    if not listed["file"] or not (folder / listed["file"]).is_file():
        return key, Cell(None, listed["why"] or NOT_RUN), None
    path = folder / listed["file"]
    cure = "delete it and run the suite again"
    found = _json(path, cure)
    try:
        if (found["model"], found["defence"]) != key:
            raise ValueError(f"it is of {found['model']} and {found['defence']}")
        made = {name: found["made"][name] for name in ("commit", "machine")}
        return key, Cell(parse(level, found["result"]), None), made
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _broken(path, error, cure) from error


T = TypeVar("T", Model, Line, Published)


def _made(kind: type[T], found: Mapping[str, Any]) -> T:
    """The object's fields by their names; what else is there is not ours to read."""
    return kind(**{field.name: found[field.name] for field in fields(kind)})


def _check(
    models: Sequence[Model], defences: Sequence[Line], published: Sequence[Published]
) -> None:
    truths: dict[tuple[str, str, str], str] = {}
    for model in models:
        if model.kind not in KINDS or model.truth not in TRUTHS:
            raise ValueError(f"model '{model.name}' is of kind {model.kind}, truth {model.truth}")
        if truths.setdefault((model.base, model.label, model.group), model.truth) != model.truth:
            raise ValueError(f"'{model.label}' is the label of benign and backdoored models")
    for line in defences:
        if line.level not in METRICS:
            raise ValueError(f"defence '{line.name}' is of level {line.level}")
    levels = {line.name: line.level for line in defences}
    for each in published:  # a figure of a defence that the suite leaves out waits for its turn
        if each.defence in levels:
            known = [metric.key for metric in METRICS[levels[each.defence]]]
            if each.metric not in known:
                raise ValueError(f"published '{each.metric}' is none of {', '.join(known)}")


def _unknown(model: str) -> bool:
    raise ValueError(f"a cell is of model '{model}', which is not listed")


def _json(path: Path, cure: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(path, error, cure) from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no JSON object: {cure}.")
    return found


def _broken(path: Path, error: Exception, cure: str) -> UsageError:
    what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return UsageError(f"{path} is not what the benchmark writes ({what}): {cure}.")


def _in_words(machine: Any) -> str:
    if not isinstance(machine, Mapping):
        return str(machine)
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
