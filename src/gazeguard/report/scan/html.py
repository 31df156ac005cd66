"""`scan.html`: one self-contained page for people, with no script and no network access.

A list may hold hundreds of models: all are in the table, and the worst `MAX_DETAILS` have their
gates, pictures and evidence.
"""

from __future__ import annotations

from typing import Any

from gazeguard._version import __version__
from gazeguard.jsonable import jsonable
from gazeguard.report import words
from gazeguard.report.scan.pictures import pictures
from gazeguard.report.scan.sights import sights
from gazeguard.report.scan.text import IN_WORDS, by_severity, headline, left_out, suspicion
from gazeguard.report.template import asset, environment, policy
from gazeguard.scanning.result import ScannedModel, ScanReport

MAX_DETAILS = 30
_COLOURS = {"clean": "clean", "flagged": "flagged"}  # anything else looks undecided


def render_html(report: ScanReport) -> str:
    """The file's text."""
    style = asset("report.css") + asset("scan.css")
    ordered = by_severity(report)
    plain: dict[str, Any] = jsonable(report.provenance)
    return (
        environment()
        .get_template("scan.html")
        .render(
            headline=headline(report),
            lede=_lede(report),
            next_step=_next_step(report),
            outcome=report.outcome,
            colour=_COLOURS.get(report.outcome, "inconclusive"),
            counts={name: report.count(name) for name in IN_WORDS},
            total=len(report.models),
            finished=report.finished,
            methods={model.method for model in report.models} - {""} or {"amdet"},
            rows=[_row(model) for model in report.models],
            details=[_details(model) for model in ordered[:MAX_DETAILS]],
            hidden=max(0, len(ordered) - MAX_DETAILS),
            provenance=words.flatten(plain),
            policy=policy("", style),
            style=style,
            version=__version__,
        )
    )


def _lede(report: ScanReport) -> str:
    if not report.finished:
        return "The scan did not finish. What is not in the table below has not been looked at."
    if len(report.models) == 1:
        return report.models[0].reason
    if report.outcome in ("flagged", "clean"):
        return ""
    return "This is not an all-clear: some models could not be judged."


def _next_step(report: ScanReport) -> str:
    return {
        "flagged": "Do not put the flagged models into use. Look at what was found below, and ask"
        " whoever made the model.",
        "error": "Mend what the messages name and run the same command again.",
        "not-scanned": "Run the same command again; with --out it goes on where it was.",
        "inconclusive": "Treat the undecided models as unchecked until the cause that is named"
        " below is removed.",
        "clean": "The models can be used as they are, within the limits named at the end of this"
        " page.",
    }[report.outcome]


def _row(model: ScannedModel) -> dict[str, Any]:
    return {
        "model": model.model,
        "outcome": model.outcome,
        "in_words": IN_WORDS[model.outcome],
        "suspicion": suspicion(model),
        "score": model.numbers.get("score"),
        "reason": model.reason,
    }


def _details(model: ScannedModel) -> dict[str, Any]:
    verdict = model.verdict
    plain: dict[str, Any] = jsonable(model.numbers)
    return {
        **_row(model),
        "colour": _COLOURS.get(model.outcome, "inconclusive"),
        "tagged": not model.reason.lower().startswith((IN_WORDS[model.outcome], model.outcome)),
        "checks": model.checks,
        "evidence": [] if verdict is None else [finding.message for finding in verdict.evidence],
        "threshold": None if verdict is None else verdict.threshold,
        "source": "" if verdict is None else verdict.threshold_source,
        "pictures": pictures(model.figures),
        "images": model.figures.get("images", []),
        "sights": sights(model.figures),
        "positive": next((c.value for c in model.checks if c.name == "curvature"), None),
        "files": dict(model.files),
        "left_out": left_out(model),
        "numbers": words.flatten(plain),
        "fingerprint": model.fingerprint,
    }
