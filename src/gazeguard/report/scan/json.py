"""`scan.json`: the machine-readable report of one `gazeguard scan` run.

Schema 1.0 (`report/schema/scan-report-1.json`; a new optional field raises the second number,
anything else the first and the file's name). `outcome` is the worst of the models' outcomes:
`flagged`, `error`, `not-scanned`, `inconclusive`, `clean`, in this order; it is never `clean`
while `finished` is false. NaN and infinities are written as null.
"""

from __future__ import annotations

import json
from typing import Any

from gazeguard._version import __version__
from gazeguard.jsonable import jsonable
from gazeguard.report.scan.text import headline
from gazeguard.scanning.result import ScanReport, to_json

SCHEMA_VERSION = "1.3"


def as_json(report: ScanReport) -> dict[str, Any]:
    """The report as JSON types."""
    payload: dict[str, Any] = jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "scan-report",
            "tool": {"name": "gazeguard", "version": __version__},
            "finished": report.finished,
            "outcome": report.outcome,
            "summary": headline(report),
            "models": [to_json(model) for model in report.models],
            "provenance": report.provenance,
        }
    )
    return payload


def render_json(report: ScanReport) -> str:
    """The file's text."""
    return json.dumps(as_json(report), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
