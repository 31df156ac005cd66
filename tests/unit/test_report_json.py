from __future__ import annotations

import dataclasses
import json
import math
import re
from importlib import resources, util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gazeguard.errors import UsageError
from gazeguard.jsonable import jsonable
from gazeguard.report.json import write_json
from gazeguard.report.model import headline
from gazeguard.types import Outcome
from tests.unit.report_fixture import make_report

SCHEMA = json.loads(
    resources.files("gazeguard.report").joinpath("schema", "clean-report-1.json").read_text()
)
KINDS = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": int | float,
    "null": type(None),
}


def has_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, KINDS[kind])


def violations(value: Any, schema: dict[str, Any], at: str = "$") -> list[str]:
    """Breaches of the keywords our schema uses; an unknown keyword is itself a breach."""
    known = {"$schema", "title", "type", "required", "properties", "additionalProperties", "items"}
    known |= {"enum", "const", "pattern", "minimum", "maximum", "minLength"}
    found = [f"{at}: keyword {word} is not checked here" for word in set(schema) - known]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(has_kind(value, kind) for kind in kinds):
        return [*found, f"{at}: {value!r} is not {kinds}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: {value!r} is not one of {schema['enum']}")
    if "const" in schema and value != schema["const"]:
        found.append(f"{at}: {value!r} is not {schema['const']!r}")
    if isinstance(value, str):
        if not re.search(schema.get("pattern", ""), value):
            found.append(f"{at}: {value!r} does not match {schema['pattern']}")
        if len(value) < schema.get("minLength", 0):
            found.append(f"{at}: too short")
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if isinstance(value, int | float) and not low <= value <= high:
        found.append(f"{at}: {value} is out of range")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        found += [
            f"{at}: {name} is missing" for name in schema.get("required", []) if name not in value
        ]
        for name, item in value.items():
            extra = schema.get("additionalProperties", {})
            if name not in properties and extra is False:
                found.append(f"{at}: {name} is not allowed")
                continue
            found += violations(item, properties.get(name, extra), f"{at}.{name}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += violations(item, schema.get("items", {}), f"{at}[{i}]")
    return found


def written(report: Any, tmp_path: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = write_json(report, tmp_path / "report.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return loaded


@pytest.mark.parametrize("outcome", list(Outcome))
def test_report_json_follows_the_shipped_schema(outcome: Outcome, tmp_path: Path) -> None:
    loaded = written(make_report(outcome), tmp_path)
    assert violations(loaded, SCHEMA) == []
    if util.find_spec("jsonschema"):  # an independent judge where there is one
        import jsonschema

        jsonschema.validate(loaded, SCHEMA)
    assert loaded["outcome"] == outcome.value
    assert sum(loaded["counts"][k] for k in ("kept", "removed", "skipped")) == 1500
    assert loaded["thresholds"]["bsi"] == {
        "value": 2.0,
        "source": "arXiv:2505.16916, section 4.2",
    }


def test_the_structural_check_notices_a_wrong_report(tmp_path: Path) -> None:
    loaded = written(make_report(), tmp_path)
    loaded["outcome"] = "fine"
    loaded["counts"]["lost"] = 3
    loaded["layers"][0]["bsi"] = "high"
    loaded["suspicion"] = 1.5
    del loaded["provenance"]
    assert len(violations(loaded, SCHEMA)) == 5


def test_layer_entropies_are_averages_of_kept_and_flagged_rows(tmp_path: Path) -> None:
    report = make_report(n=60, poisoned=6, skipped=0)
    flagged = report.result.is_flagged
    first = written(report, tmp_path)["layers"][0]
    assert first["mean_entropy_kept"] == pytest.approx(report.entropy[~flagged, 0].mean(), abs=1e-5)
    assert first["mean_entropy_flagged"] == pytest.approx(
        report.entropy[flagged, 0].mean(), abs=1e-5
    )


def test_nan_and_odd_types_become_valid_json(tmp_path: Path) -> None:
    report = make_report(n=60, poisoned=6)
    report.result.info.update(
        nan=float("nan"), array=np.array([1.0, np.inf]), path=Path("a/b"), odd={3: {2, 1}}
    )
    report.entropy[:, 0] = np.nan
    report.result.score[0] = np.nan
    loaded = written(report, tmp_path)
    assert loaded["info"]["nan"] is None
    assert loaded["info"]["array"] == [1.0, None]
    assert loaded["info"]["path"] == "a/b"
    assert loaded["info"]["odd"] == {"3": [1, 2]}
    assert loaded["layers"][0]["mean_entropy_kept"] is None
    assert violations(loaded, SCHEMA) == []


def test_jsonable_keeps_booleans_and_numbers_apart() -> None:
    assert jsonable([np.bool_(True), True, np.int64(3), Outcome.CLEAN]) == [True, True, 3, "clean"]
    assert jsonable([np.bool_(True)])[0] is True


def test_lone_surrogates_do_not_break_the_file(tmp_path: Path) -> None:
    report = make_report(n=60, poisoned=6)
    report.result.info["name"] = "caf\udce9"
    assert written(report, tmp_path)["info"]["name"] == "caf?"


def test_a_failed_write_leaves_the_old_report_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        UsageError, match=r"No space left on device.*choose another output folder\."
    ):
        write_json(make_report(n=60, poisoned=6), path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("outcome", "poisoned", "expected"),
    [
        (Outcome.FLAGGED, 12, "12 of 1,500 rows look poisoned and were removed"),
        (Outcome.FLAGGED, 1, "1 of 1,500 rows looks poisoned and was removed"),
        (Outcome.CLEAN, 0, "No sign of poisoning: nothing was removed"),
        (
            Outcome.INCONCLUSIVE,
            0,
            "Could not decide: 12 rows could be measured, and at least 50 are needed to tell two "
            "groups",
        ),
    ],
)
def test_headline_is_one_plain_sentence(outcome: Outcome, poisoned: int, expected: str) -> None:
    assert headline(make_report(outcome, poisoned=poisoned, skipped=0)) == expected


def test_a_report_refuses_numbers_that_do_not_add_up() -> None:
    report = make_report(n=60, poisoned=6)
    with pytest.raises(ValueError, match="add up"):
        dataclasses.replace(report, counts={**report.counts, "kept": 1})
    with pytest.raises(ValueError, match="other lengths.*answers"):
        dataclasses.replace(report, answers=[])
