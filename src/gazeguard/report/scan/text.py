"""Sentences about a scan that several formats share."""

from __future__ import annotations

from gazeguard.report import words
from gazeguard.scanning.result import ScannedModel, ScanReport

# Worst first: the order of tables and summaries.
OUTCOMES = ("flagged", "error", "not-scanned", "inconclusive", "clean")
IN_WORDS = {
    "flagged": "flagged",
    "error": "could not be used",
    "not-scanned": "not scanned",
    "inconclusive": "undecided",
    "clean": "no sign of a backdoor",
}


def headline(report: ScanReport) -> str:
    """The whole list as one plain sentence, without its full stop."""
    if len(report.models) == 1:
        model = report.models[0]
        return {
            "flagged": f"{model.model} looks backdoored",
            "clean": f"No sign of a backdoor in {model.model}",
            "inconclusive": f"Could not decide about {model.model}",
            "error": f"{model.model} could not be scanned",
            "not-scanned": f"{model.model} has not been scanned yet",
        }[model.outcome]
    parts = [
        f"{words.count(report.count(name))} {IN_WORDS[name]}"
        for name in OUTCOMES
        if report.count(name)
    ]
    start = "" if report.finished else "The scan did not finish: "
    return f"{start}{words.plural(len(report.models), 'model')}: {', '.join(parts)}"


def left_out(model: ScannedModel) -> list[str]:
    """A line for each part of a model that was not scanned and that its reason does not tell of."""
    return [f"Not scanned: {p}." for p in model.not_scanned if p.why not in model.reason]


def by_severity(report: ScanReport) -> list[ScannedModel]:
    """The models, worst first; equals in the order given."""
    return sorted(report.models, key=lambda model: OUTCOMES.index(model.outcome))


def suspicion(model: ScannedModel) -> float | None:
    """In [0, 1], or None where nothing was measured."""
    return None if model.verdict is None else model.verdict.suspicion
