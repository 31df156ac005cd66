"""The runs of a benchmark put together: conditions, what each defence reached on them, what lacks.

A condition is what the suite calls by one label and group on one base; its runs are its models.
Where models themselves are judged, the group (what they were tuned on) plays no part, and all
attacked models of a base are a condition of their own, those of adaptive attackers another.
Models whose attack failed are in no number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from gazeguard.bench.report import estimates
from gazeguard.bench.report.bootstrap import Estimate
from gazeguard.bench.report.quantities import KINDS, METRICS
from gazeguard.bench.report.results import InputResult, Result
from gazeguard.bench.report.stored import Line, Model, StoredRun

NOT_APPLICABLE = "not applicable"
EVERYTHING = "everything"
POOLS = {"all attacks": False, "all adaptive attacks": True}
"""Label of a pooled condition -> whether its attackers hide."""


@dataclass(frozen=True, eq=False)
class Condition:
    """Models that differ in their seed, and in what label and group leave out, sorted by name."""

    base: str
    label: str
    group: str
    models: tuple[Model, ...]
    pooled: bool = False

    @property
    def key(self) -> str:
        """Its name among all conditions; draws are made of it."""
        return f"{self.base} | {self.label} | {self.group}"

    @property
    def attack(self) -> str:
        """The attack's name, without its rate; a pooled condition's label."""
        return self.label if self.pooled else self.models[0].attack

    @property
    def backdoored(self) -> bool:
        """False for benign models."""
        return self.models[0].truth == "backdoored"

    @cached_property
    def passed(self) -> tuple[Model, ...]:
        """Those whose attack took."""
        return tuple(model for model in self.models if model.passed)


@dataclass(frozen=True, slots=True)
class Missing:
    """Why some runs of a condition are in none of a defence's numbers (or not in `what`)."""

    condition: Condition
    defence: Line
    what: str
    why: str
    models: int


@dataclass(frozen=True)
class Part:
    """One level of defence on one kind of model: what is compared with each other.

    Attributes:
        found: by condition key and defence name; numbers by metric name, none where all lacks.
        missing: what is in no number, sorted as conditions and defences are.
    """

    level: str
    kind: str
    conditions: tuple[Condition, ...]
    defences: tuple[Line, ...]
    found: Mapping[tuple[str, str], Mapping[str, Estimate]]
    missing: tuple[Missing, ...]

    def of(self, condition: Condition, defence: Line | str, metric: str) -> Estimate | None:
        """One number, or None."""
        name = defence if isinstance(defence, str) else defence.name
        return self.found.get((condition.key, name), {}).get(metric)

    @property
    def attacked(self) -> tuple[Condition, ...]:
        """Conditions of backdoored models."""
        return tuple(condition for condition in self.conditions if condition.backdoored)

    @property
    def overview(self) -> tuple[Condition, ...]:
        """What means and margins are over: pooled conditions, where there are any that do not hide.

        An adaptive attacker's aim is one defence; a mean with him in it is of no use to a reader.
        """
        return tuple(c for c in self.attacked if POOLS.get(c.label) is False) or self.attacked


def conditions(models: Sequence[Model]) -> tuple[Condition, ...]:
    """Every condition, in the order of its first model."""
    groups: dict[tuple[str, str, str], list[Model]] = {}
    for model in models:
        groups.setdefault((model.base, model.label, model.group), []).append(model)
    return tuple(
        Condition(*key, tuple(sorted(found, key=lambda model: model.name)))
        for key, found in groups.items()
    )


def verdicts(models: Sequence[Model]) -> tuple[Condition, ...]:
    """Conditions where models are judged: pooled ones of every base first, then every label."""
    found = []
    for base in dict.fromkeys(model.base for model in models):
        mine = [m for m in models if m.base == base]
        for label, adaptive in POOLS.items():
            bad = [m for m in mine if m.truth == "backdoored" and m.adaptive == adaptive]
            if bad:
                bad.sort(key=lambda model: model.name)
                found.append(Condition(base, label, "", tuple(bad), pooled=True))
    alike = [replace(model, group="") for model in models]
    return (*found, *conditions(alike))


def parts(run: StoredRun) -> list[Part]:
    """Every level and kind of model of which the run has a cell that applies."""
    sets, whole = conditions(run.models), verdicts(run.models)
    found = [
        _part(run, whole if level == "model" else sets, level, kind)
        for level in METRICS
        for kind in KINDS
    ]
    return [part for part in found if part.conditions]


def _part(run: StoredRun, every: Sequence[Condition], level: str, kind: str) -> Part:
    lines = [line for line in run.defences if line.level == level]
    groups = [c for c in every if c.models[0].kind == kind]

    def applies(condition: Condition, line: Line) -> bool:
        cells = (run.cells.get((model.name, line.name)) for model in condition.models)
        return any(cell and not (cell.why or "").startswith(NOT_APPLICABLE) for cell in cells)

    used = [c for c in groups if any(applies(c, line) for line in lines)]
    lines = [line for line in lines if any(applies(c, line) for c in used)]
    found: dict[tuple[str, str], Mapping[str, Estimate]] = {}
    missing: list[Missing] = []
    for condition in used:
        for line in lines:
            results = _results(run, condition, line)
            if results:
                benign = f"{condition.base} | {line.name}" if level == "model" else None
                draw = estimates.Draw(condition.key, f"{condition.key} | {line.name}", benign)
                clean = _clean(run, used, condition, line)
                found[condition.key, line.name] = estimates.of(
                    level, results, draw, condition.backdoored, clean
                )
            if not condition.pooled:
                missing += _missing(run, condition, line)
    return Part(level, kind, tuple(used), tuple(lines), found, tuple(missing))


def _results(run: StoredRun, condition: Condition, line: Line) -> list[Result]:
    cells = (run.cells.get((model.name, line.name)) for model in condition.passed)
    return [cell.result for cell in cells if cell and cell.result is not None]


def _clean(
    run: StoredRun, used: Sequence[Condition], condition: Condition, line: Line
) -> list[Result]:
    """What the defence said of all benign models of the condition's base."""
    benign = [c for c in used if not c.backdoored and c.base == condition.base]
    return [result for each in benign for result in _results(run, each, line)]


def _missing(run: StoredRun, condition: Condition, line: Line) -> Iterator[Missing]:
    reasons: Counter[tuple[str, str]] = Counter()
    for model in condition.models:
        cell = run.cells.get((model.name, line.name))
        if cell is None:  # a suite need not ask every model, for instance not the references
            continue
        if not model.passed:
            reasons[EVERYTHING, model.why or cell.why or "attack failed"] += 1
        elif cell.result is None:
            reasons[EVERYTHING, cell.why or ""] += 1
        elif broken := _broken(cell.result):
            reasons["scores", f"{broken} of them are no finite numbers"] += 1
    if not any((model.name, line.name) in run.cells for model in condition.models):
        reasons[EVERYTHING, "not asked for in this suite"] = len(condition.models)
    for (what, why), n in sorted(reasons.items()):
        yield Missing(condition, line, what, why, n)


def _broken(result: Result) -> int:
    """Rows whose score is no number."""
    return result.scores.broken if isinstance(result, InputResult) and result.scores else 0
