"""`report.json`: the machine-readable report of one `gazeguard clean` run.

Schema 1.3 (`schema/clean-report-1.json` in this package; a new optional field raises the second
number, anything else the first and the file's name):

| field | type | meaning |
|---|---|---|
| `schema_version` | string | `"1.3"` |
| `kind` | string | `"clean-report"` |
| `tool` | object | `name`, `version` |
| `method`, `rule` | string | which detector and which variant of it |
| `outcome` | string | `clean`, `flagged` or `inconclusive` |
| `summary` | string | the verdict as one sentence |
| `reason` | string | why, as one sentence |
| `suspicion` | number or null | of the whole set, [0, 1], 1 = worst |
| `threshold`, `threshold_source` | number or null, string | flagged from here on |
| `evidence` | array | `{message, data}` |
| `counts` | object | `rows` = `kept` + `removed` + `skipped`; kept: `suspected`, `text_only` |
| `not_looked_at` | object | cause -> skipped rows |
| `beyond_limit` | integer | rows after `--limit`: not looked at, in no file |
| `near_misses` | array | `{row, turn, sample_id, phrase, removed}`: of `MAX_NEAR_MISSES` answers |
| `proofs` | array | `{phrase, proven, sentence}`; tried: `form`, `words`, `pictures`, `fired` |
| `layers` | array | `{layer, bsi, selected, mean_entropy_kept, mean_entropy_flagged}`; nats |
| `thresholds` | object | name -> `{value, source}`: every number a decision rests on |
| `components` | array | `{mean, std, weight, suspicious}`, in the units of `score_name` |
| `score_name` | string | the statistic the components were fitted to |
| `info` | object | method-specific numbers |
| `files` | object | what -> path |
| `provenance` | object | what was run on what |

NaN and infinities are written as null, so the file is always valid JSON. Rows are not listed
here: they are in `verdicts.parquet` and `reasons.jsonl`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gazeguard._version import __version__
from gazeguard.jsonable import jsonable
from gazeguard.report.files import write_atomic
from gazeguard.report.layers import layer_rows
from gazeguard.report.model import CleanReport, Proof, causes, headline, thresholds

SCHEMA_VERSION = "1.3"
KIND = "clean-report"
MAX_NEAR_MISSES = 100


def as_json(report: CleanReport) -> dict[str, Any]:
    """The report as JSON types, as documented in this module."""
    result, verdict = report.result, report.result.verdict
    payload = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "tool": {"name": "gazeguard", "version": __version__},
        "method": result.method,
        "rule": result.rule,
        "outcome": verdict.outcome,
        "summary": headline(report),
        "reason": verdict.reason,
        "suspicion": verdict.suspicion,
        "threshold": verdict.threshold,
        "threshold_source": verdict.threshold_source,
        "evidence": [{"message": f.message, "data": f.data} for f in verdict.evidence],
        "counts": report.counts,
        "not_looked_at": causes(report.skipped),
        "beyond_limit": report.beyond,
        "near_misses": [
            {
                "row": int(report.rows[miss.place]),
                "turn": int(report.turns[miss.place]),
                "sample_id": report.sample_ids[miss.place],
                "phrase": miss.phrase,
                "removed": bool(result.is_flagged[miss.place]),
            }
            for miss in result.near_misses[:MAX_NEAR_MISSES]
        ],
        "proofs": [_proof(proof) for proof in report.proofs],
        "layers": layer_rows(report),
        "thresholds": thresholds(report),
        "components": result.components,
        "score_name": result.score_name,
        "info": result.info,
        "files": report.files,
        "provenance": report.provenance,
    }
    converted: dict[str, Any] = jsonable(payload)
    return converted


def _proof(proof: Proof) -> dict[str, Any]:
    """Counts of one rebuilt trigger: answers with the group's words, of so many pictures each."""
    about = {"phrase": proof.phrase, "proven": proof.proven, "sentence": proof.sentence}
    if (found := proof.firing) is None:
        return about
    fired = {
        "triggered": found.triggered,
        "untouched": found.untouched,
        "before": found.before,
        "interval": found.interval,
    }
    way = {"form": proof.form, "words": proof.words}
    return {**about, **way, "pictures": found.n, "fired": fired}


def write_json(report: CleanReport, path: str | Path) -> Path:
    """Write `report.json` in one step.

    Raises:
        UsageError: the file cannot be written.
    """
    text = json.dumps(as_json(report), ensure_ascii=False, indent=2, allow_nan=False)
    return write_atomic(path, text + "\n")
