"""The machine-readable report of one guarded run.

Schema 1.2 (`report/schema/guard-report-1.json`; a new optional field raises the second number,
anything else the first and the file's name). `outcome` is that of the worst request, and never
`clean` while `finished` is false. Requests are not listed: `gazeguard guard --data` prints a JSON
line for each.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from gazeguard._version import __version__
from gazeguard.jsonable import jsonable
from gazeguard.report.guard.model import (
    CONFIDENCE,
    GuardReport,
    chance_if_clean,
    flagged_interval,
)
from gazeguard.report.guard.text import headline
from gazeguard.report.page import skipped_groups

SCHEMA_VERSION = "1.2"
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def as_json(report: GuardReport) -> dict[str, Any]:
    """The report as JSON types."""
    counts, interval = report.counts, flagged_interval(report.counts)
    share = counts.flagged / counts.judged if counts.judged else None
    payload: dict[str, Any] = jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "guard-report",
            "tool": {"name": "gazeguard", "version": __version__},
            "finished": report.finished,
            "outcome": report.outcome,
            "summary": headline(report),
            "mode": report.mode,
            "counts": counts,
            "threshold": report.threshold,
            "threshold_source": report.source,
            "alpha": report.alpha,
            "rate_bound": report.rate_bound,
            "most_divergent": report.most_divergent,
            "threshold_spread": report.spread,
            "flagged_share": {
                "value": share,
                "low": interval and interval[0],
                "high": interval and interval[1],
                "confidence": CONFIDENCE,
                "chance_if_clean": chance_if_clean(report),
            },
            "scores": {
                "calibration": _summary(report.calibration),
                "requests": _summary(report.scores),
            },
            "not_judged": [
                {"count": group["count"], "example": group["example"]}
                for group in skipped_groups(report.reasons)
            ],
            "guard": report.guard,
            "provenance": report.provenance,
        }
    )
    return payload


def render_json(report: GuardReport) -> str:
    """The file's text."""
    return json.dumps(as_json(report), ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def _summary(scores: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """How many, and their least, quartiles and greatest; null where there are none."""
    names = ("min", "q25", "median", "q75", "max")
    values = np.quantile(scores, _QUANTILES).tolist() if len(scores) else [None] * len(names)
    return {"n": len(scores), **dict(zip(names, values, strict=True))}
