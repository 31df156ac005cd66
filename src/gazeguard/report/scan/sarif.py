"""SARIF 2.1.0, for code-scanning dashboards.

Every model is a result. Only `fail` may carry a level, and viewers hide the other kinds, so what is
undecided or was not scanned is also a notification, and `executionSuccessful` is false unless every
model was scanned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gazeguard._version import __version__
from gazeguard.jsonable import jsonable
from gazeguard.report.scan.text import left_out
from gazeguard.scanning.result import ScannedModel, ScanReport

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_RULES = {
    "gazeguard/amdet/backdoored-encoder": (
        "BackdooredEncoder",
        "A text encoder holds a planted backdoor.",
        "An embedding was found that turns every prompt into the same output, to which a clean"
        " encoder of the same family does not react. Do not use the encoder; the report names the"
        " recovered trigger and target.",
    ),
    "gazeguard/entropyscan/backdoored-model": (
        "BackdooredModel",
        "A vision-language model, or an adapter for one, holds a planted backdoor.",
        "On harmless pictures its attention differs from that of the base in a way in which benign"
        " fine-tunes of the base do not differ. Do not use the model; the report shows where it"
        " stands among the references.",
    ),
    "gazeguard/scan/not-scanned": (
        "NotScanned",
        "A model could not be scanned.",
        "This is not an all-clear. Mend what the message names and scan again.",
    ),
}
_RULE_IDS = list(_RULES)
_KINDS = {
    "flagged": ("fail", "error"),
    "clean": ("pass", "none"),
    "inconclusive": ("review", "none"),
    "error": ("open", "none"),
    "not-scanned": ("open", "none"),
}


def as_sarif(report: ScanReport) -> dict[str, Any]:
    """The log as JSON types."""
    undecided = [m for m in report.models if m.outcome not in ("clean", "flagged")]
    scanned = report.finished and not report.count("error")
    invocation: dict[str, Any] = {
        "executionSuccessful": scanned,
        "toolExecutionNotifications": [
            *(_notification(model, model.reason) for model in undecided),
            *(_notification(m, line) for m in report.models for line in left_out(m)),
        ],
        "properties": {"finished": report.finished, "outcome": report.outcome},
    }
    if not scanned:
        invocation["exitCodeDescription"] = "Not every model was scanned."
    converted: dict[str, Any] = jsonable(
        {
            "$schema": SCHEMA,
            "version": "2.1.0",
            "runs": [
                {
                    "tool": {
                        "driver": {
                            "name": "gazeguard",
                            "version": __version__,
                            "rules": [_rule(name) for name in _RULE_IDS],
                        }
                    },
                    "invocations": [invocation],
                    "results": [_result(model) for model in report.models],
                    "properties": {"provenance": report.provenance},
                }
            ],
        }
    )
    return converted


def render_sarif(report: ScanReport) -> str:
    """The file's text."""
    return json.dumps(as_sarif(report), ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def _rule(name: str) -> dict[str, Any]:
    title, short, full = _RULES[name]
    return {
        "id": name,
        "name": title,
        "shortDescription": {"text": short},
        "fullDescription": {"text": full},
        "defaultConfiguration": {"level": "error"},
    }


def _location(model: ScannedModel) -> dict[str, Any]:
    """A relative URI where the model lies below the working folder, so that runs compare."""
    path = Path(model.model).expanduser()
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        uri = quote(path.relative_to(Path.cwd()).as_posix())
    elif path.is_absolute():
        uri = path.as_uri()
    else:
        uri = quote(path.as_posix())
    return {"physicalLocation": {"artifactLocation": {"uri": uri}}}


def _result(model: ScannedModel) -> dict[str, Any]:
    rule = _RULE_IDS[-1]
    if model.verdict is not None:
        rule = next(name for name in _RULE_IDS if name.startswith(f"gazeguard/{model.method}/"))
    kind, level = _KINDS[model.outcome]
    result: dict[str, Any] = {
        "ruleId": rule,
        "ruleIndex": _RULE_IDS.index(rule),
        "kind": kind,
        "level": level,
        "message": {"text": model.reason},
        "locations": [_location(model)],
        "properties": {
            "outcome": model.outcome,
            "method": model.method,
            "checks": model.checks,
            "notScanned": model.not_scanned,
            "evidence": []
            if model.verdict is None
            else [f.message for f in model.verdict.evidence],
        },
    }
    if model.verdict is not None:
        result["properties"]["suspicion"] = model.verdict.suspicion
        result["properties"]["threshold_source"] = model.verdict.threshold_source
    if model.fingerprint:
        result["partialFingerprints"] = {"modelFiles/v1": model.fingerprint}
    return result


def _notification(model: ScannedModel, text: str) -> dict[str, Any]:
    return {
        "level": "error" if model.outcome in ("error", "not-scanned") else "warning",
        "message": {"text": f"{model.model}: {text}"},
        "locations": [_location(model)],
    }
