"""All formats of a scan say the same, and none says clean about what was not scanned."""

from __future__ import annotations

import json
import re
from html import unescape
from importlib import resources
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
from rich.console import Console

from gazeguard.report.scan import WRITERS, render_html, render_json, render_junit, render_sarif
from gazeguard.report.scan.console import render_console
from gazeguard.report.scan.html import MAX_DETAILS
from gazeguard.scanning.result import ScannedModel, ScanReport, Status, from_json, to_json
from gazeguard.types import Outcome
from tests.unit.scan_fixture import (
    NASTY,
    clean_report,
    full_report,
    scanned,
    waiting_report,
)

REPORTS = {
    "full": full_report(),
    "cut": full_report(finished=False),
    "clean": clean_report(),
    "waiting": waiting_report(),
    "none": ScanReport((), False, {}),
}
SARIF_SCHEMA = json.loads(
    (Path(__file__).parents[1] / "data" / "sarif-2.1.0.json").read_text("utf-8")
)


def run_of(report: ScanReport) -> dict:
    return json.loads(render_sarif(report))["runs"][0]


@pytest.mark.parametrize("name", REPORTS)
def test_sarif_is_valid(name: str):
    log = json.loads(render_sarif(REPORTS[name]))
    jsonschema.Draft4Validator(SARIF_SCHEMA).validate(log)


def test_the_sarif_schema_would_notice():
    log = json.loads(render_sarif(full_report()))
    log["runs"][0]["results"][0]["kind"] = "backdoored"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft4Validator(SARIF_SCHEMA).validate(log)


def test_sarif_kinds_levels_and_fingerprints():
    run = run_of(full_report())
    results = run["results"]
    assert [r["kind"] for r in results] == ["pass", "fail", "review", "open"]
    assert [r["level"] for r in results] == ["none", "error", "none", "none"]
    assert all(run["tool"]["driver"]["rules"][r["ruleIndex"]]["id"] == r["ruleId"] for r in results)
    assert results[1]["partialFingerprints"] == {"modelFiles/v1": "ab" * 32}
    assert results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == (
        "models/clean"
    )
    notes = run["invocations"][0]["toolExecutionNotifications"]
    assert [n["level"] for n in notes] == ["warning", "error"]


@pytest.mark.parametrize(
    ("name", "successful"),
    [("clean", True), ("full", False), ("cut", False), ("waiting", False), ("none", False)],
)
def test_sarif_says_whether_every_model_was_scanned(name: str, successful: bool):
    assert run_of(REPORTS[name])["invocations"][0]["executionSuccessful"] is successful


@pytest.mark.parametrize("name", REPORTS)
def test_json_matches_its_schema(name: str):
    text = (resources.files("gazeguard.report") / "schema" / "scan-report-1.json").read_text(
        "utf-8"
    )
    jsonschema.Draft202012Validator(json.loads(text)).validate(
        json.loads(render_json(REPORTS[name]))
    )


def test_the_json_schema_refuses_an_unfinished_clean_scan():
    text = (resources.files("gazeguard.report") / "schema" / "scan-report-1.json").read_text(
        "utf-8"
    )
    lie = {**json.loads(render_json(waiting_report())), "outcome": "clean"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json.loads(text)).validate(lie)


def test_junit_counts_and_kinds():
    root = ElementTree.fromstring(render_junit(full_report(finished=False)))
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("5", "1", "3")
    kinds = [
        [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        for case in root.iter("testcase")
    ]
    assert kinds == [[], ["failure"], ["error"], ["error"], ["error"]]
    assert "\x00" not in render_junit(full_report())


def test_an_empty_junit_file_is_an_error():
    root = ElementTree.fromstring(render_junit(ScanReport((), False, {})))
    assert (root.get("tests"), root.get("errors")) == ("1", "1")


@pytest.mark.parametrize("name", ["full", "cut", "waiting", "none"])
@pytest.mark.parametrize("form", WRITERS)
def test_no_format_reads_as_clean(name: str, form: str):
    report = REPORTS[name]
    assert report.outcome != "clean"
    text = WRITERS[form](report)
    if form == "html":
        assert '<body class="outcome-clean">' not in text
    elif form == "json":
        assert json.loads(text)["outcome"] != "clean"
    elif form == "sarif":
        assert not json.loads(text)["runs"][0]["invocations"][0]["executionSuccessful"]
    else:
        root = ElementTree.fromstring(text)
        assert int(root.get("failures")) + int(root.get("errors")) > 0


def test_the_page_is_inert_and_complete():
    page = render_html(full_report())
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>fenjvex</b>" not in page
    assert "script-src 'none'" in unescape(page)
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"<[^>]+\sstyle=", page), "the policy would drop inline styles"
    assert page.count("data:image/png;base64,") == 3
    for label in ("Natural backdoor", "Agreement", "0.995", "fenjvex", "models/broken"):
        assert label in page


def test_the_page_of_a_long_list_stays_small():
    models = tuple(scanned(f"m{i}", Outcome.CLEAN, 0.1) for i in range(200))
    page = render_html(ScanReport(models, True, {}))
    assert page.count("<article") == MAX_DETAILS
    assert "m199" in page
    assert len(page) < 1_000_000


def test_console_names_every_model_and_the_worst_first_line():
    console = Console(width=100, file=StringIO(), record=True)
    console.print(render_console(full_report(finished=False)))
    text = console.export_text()
    assert text.splitlines()[0].startswith("The scan did not finish")
    for name in ("models/clean", "models/unsure", "models/broken", "models/waiting"):
        assert name in text


def test_worst_outcome_wins():
    full = full_report(finished=False)
    assert full.outcome == "flagged"
    assert ScanReport(full.models[2:], False, {}).outcome == "error"
    assert ScanReport(full.models[2:3], True, {}).outcome == "inconclusive"
    assert clean_report().outcome == "clean"
    assert ScanReport(clean_report().models, False, {}).outcome == "not-scanned"


def test_entries_survive_the_store():
    for model in full_report(finished=False).models:
        stored = json.loads(json.dumps(to_json(model)))
        again = from_json(stored)
        assert to_json(again) == to_json(model)
        assert again.outcome == model.outcome


def test_status_and_verdict_belong_together():
    with pytest.raises(ValueError, match="do not go together"):
        ScannedModel("a", Status.DONE)
    with pytest.raises(ValueError, match="reason"):
        ScannedModel(NASTY, Status.FAILED)
