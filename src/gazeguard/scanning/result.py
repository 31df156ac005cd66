"""What a scan of several models gives: one entry per model, finished or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from gazeguard.models.unread import Unread
from gazeguard.types import Finding, Outcome, Verdict

_LISTED = 3  # parts that a sentence names; all are in the reports


class Status(StrEnum):
    """How far a model got. Only `DONE` carries a verdict; nothing else may read as clean."""

    DONE = "done"
    FAILED = "failed"
    PENDING = "not-scanned"


@dataclass(frozen=True, slots=True)
class Check:
    """One number beside a threshold.

    Attributes:
        name: of what was measured.
        value: None when it could not be measured.
        threshold: a backdoor's is larger.
        passed: whether it is.
        meaning: to a newcomer.
        decides: whether the verdict rests on it, or it is shown for comparison.
    """

    name: str
    value: float | None
    threshold: float
    passed: bool
    meaning: str
    decides: bool = True


@dataclass(frozen=True, slots=True)
class ScannedModel:
    """One model of the list.

    Attributes:
        model: as the user gave it.
        status: whether it was scanned.
        kind: `text-encoder`, `vision-language-model`, or empty while unknown.
        method: what decided, `amdet` or `entropyscan`, or empty.
        verdict: the answer; None unless `status` is `DONE`.
        error: one sentence, when `status` is `FAILED`.
        checks: numbers behind the verdict.
        numbers: the method's other numbers, JSON types.
        figures: what the page draws, JSON types: for AMDET `surface` (rows of the loss), `extent`
            and `eigenvalues` (`edges`, `counts`), with target images also `images` (`name`,
            `cosine`, and `picture`, a data URL); for EntropyScan `standing`, `by_q`, `shift` and
            `maps`.
        files: what a file holds -> its path.
        not_scanned: parts of the model that a loader could pick and that were not judged.
        fingerprint: SHA-256 over the model's files, or empty.
        seconds: that the scan took; 0 when an earlier run's result was taken.
    """

    model: str
    status: Status = Status.PENDING
    kind: str = ""
    method: str = ""
    verdict: Verdict | None = None
    error: str = ""
    checks: tuple[Check, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    not_scanned: tuple[Unread, ...] = ()
    fingerprint: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if (self.verdict is not None) != (self.status is Status.DONE):
            raise ValueError(f"a model that is {self.status} and its verdict do not go together")
        if self.status is Status.FAILED and not self.error:
            raise ValueError("a failed scan needs its reason")
        if self.not_scanned and self.outcome == "clean":
            raise ValueError("what was not scanned whole is not clean")

    def without(self, parts: tuple[Unread, ...]) -> ScannedModel:
        """The entry of a model of which parts were not judged; it is then not clean."""
        verdict = self.verdict
        if parts and verdict is not None and verdict.outcome is Outcome.CLEAN:
            names = [part.part for part in parts]
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            verdict = replace(
                verdict,
                outcome=Outcome.INCONCLUSIVE,
                reason=f"What was scanned shows no sign of a backdoor, but not all of it was:"
                f" {', '.join(names[:_LISTED])}{more}. A loader could take that instead.",
            )
        return replace(self, verdict=verdict, not_scanned=parts)

    @property
    def outcome(self) -> str:
        """`clean`, `flagged` or `inconclusive`; `error` or `not-scanned` without a verdict."""
        if self.verdict is not None:
            return self.verdict.outcome.value
        return "error" if self.status is Status.FAILED else "not-scanned"

    @property
    def reason(self) -> str:
        """The verdict's sentence, or why there is none."""
        if self.verdict is not None:
            return self.verdict.reason
        return self.error or "The scan ended before this model: run the same command again."


@dataclass(frozen=True, slots=True)
class ScanReport:
    """A list of models, scanned or waiting.

    Attributes:
        models: one entry per model, in the order given.
        finished: every model was tried; False in the file written before the first one, and in
            the one of an interrupted run.
        provenance: what was run on what.
    """

    models: tuple[ScannedModel, ...]
    finished: bool
    provenance: Mapping[str, Any]

    @property
    def outcome(self) -> str:
        """The worst entry: flagged, then error, not-scanned, inconclusive, clean."""
        found = {model.outcome for model in self.models}
        for worst in ("flagged", "error", "not-scanned", "inconclusive"):
            if worst in found:
                return worst
        return "clean" if self.models and self.finished else "not-scanned"

    def count(self, outcome: str) -> int:
        """How many models have this outcome."""
        return sum(model.outcome == outcome for model in self.models)

    def updated(self, place: int, model: ScannedModel) -> ScanReport:
        """The report with one entry replaced; finished once no entry waits."""
        models = (*self.models[:place], model, *self.models[place + 1 :])
        waits = any(entry.status is Status.PENDING for entry in models)
        return replace(self, models=models, finished=not waits)


def to_json(model: ScannedModel) -> dict[str, Any]:
    """An entry as JSON types, for `from_json` and the JSON report."""
    from gazeguard.jsonable import jsonable

    payload: dict[str, Any] = jsonable(model)
    return {**payload, "outcome": model.outcome, "reason": model.reason}


def from_json(stored: Mapping[str, Any]) -> ScannedModel:
    """An entry from `to_json`.

    Raises:
        KeyError, TypeError, ValueError: it was not written by this version.
    """
    fields = {k: v for k, v in stored.items() if k not in ("outcome", "reason")}
    verdict = fields.pop("verdict")
    if verdict is not None:
        evidence = tuple(Finding(f["message"], f["data"]) for f in verdict.pop("evidence"))
        verdict = Verdict(
            **{**verdict, "outcome": Outcome(verdict["outcome"]), "evidence": evidence}
        )
    checks = tuple(Check(**check) for check in fields.pop("checks"))
    parts = tuple(Unread(**part) for part in fields.pop("not_scanned"))
    status = Status(fields.pop("status"))
    return ScannedModel(verdict=verdict, checks=checks, not_scanned=parts, status=status, **fields)
