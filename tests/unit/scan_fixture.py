"""A scan of four models with every outcome, for the tests of its reports."""

from __future__ import annotations

from gazeguard.scanning.result import Check, ScannedModel, ScanReport, Status
from gazeguard.types import Finding, Outcome, Verdict

NASTY = "models/<script>alert(1)</script>&\x00 ü"


def scanned(name: str, outcome: Outcome, suspicion: float | None) -> ScannedModel:
    """A model that was scanned, with figures."""
    verdict = Verdict(
        outcome,
        suspicion,
        0.5,
        "published gates",
        f"Because {outcome}.",
        (Finding("Tokens nearest: '<b>fenjvex</b>'.", {"nan": float("nan")}),),
    )
    return ScannedModel(
        name,
        Status.DONE,
        "text-encoder",
        "amdet",
        verdict,
        checks=(
            Check("agreement", 1.0, 0.995, True, "share of prompts"),
            Check("curvature", None, 0.8, False, "share of a bowl"),
        ),
        numbers={"score": 0.87, "nearest_tokens": [["fenjvex", 0.7]]},
        figures={
            "surface": [[0.0, 0.5, 1.0], [0.2, None, 0.4], [0.3, 0.3, 0.3]],
            "extent": 10.0,
            "eigenvalues": {"edges": [-1.0, 0.0, 1.0], "counts": [3, 5]},
        },
        files={"recovered trigger and target": "recovered/a.safetensors"},
        fingerprint="ab" * 32,
        seconds=1.5,
    )


def full_report(finished: bool = True) -> ScanReport:
    """Flagged, clean, inconclusive, failed; and one that waits when unfinished."""
    models = [
        scanned("models/clean", Outcome.CLEAN, 0.1),
        scanned(NASTY, Outcome.FLAGGED, 1.0),
        scanned("models/unsure", Outcome.INCONCLUSIVE, None),
        ScannedModel("models/broken", Status.FAILED, error="models/broken has no config.json."),
    ]
    if not finished:
        models.append(ScannedModel("models/waiting"))
    return ScanReport(tuple(models), finished, {"seed": 0, "packages": {"torch": "2"}})


def clean_report() -> ScanReport:
    """One clean model."""
    return ScanReport((scanned("models/clean", Outcome.CLEAN, 0.1),), True, {"seed": 0})


def waiting_report() -> ScanReport:
    """What is written before the first model."""
    return ScanReport((ScannedModel("models/a"), ScannedModel("models/b")), False, {})
