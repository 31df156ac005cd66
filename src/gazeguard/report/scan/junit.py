"""JUnit XML, for CI servers: one test case per model.

Backdoored is a failure. Whatever else is not clean is an error, never `skipped`: many servers count
a skipped case as a good one.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from gazeguard.report import words
from gazeguard.report.scan.text import left_out
from gazeguard.scanning.result import ScannedModel, ScanReport

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(report: ScanReport) -> str:
    """The file's text."""
    errors = [m for m in report.models if m.outcome not in ("clean", "flagged")]
    totals = {
        "name": "gazeguard scan",
        "tests": str(max(1, len(report.models))),
        "failures": str(report.count("flagged")),
        "errors": str(len(errors) if report.models else 1),
        "time": f"{sum(model.seconds for model in report.models):.3f}",
    }
    root = ElementTree.Element("testsuites", totals)
    suite = ElementTree.SubElement(root, "testsuite", {**totals, "skipped": "0"})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in words.flatten(
        {"finished": report.finished, "outcome": report.outcome, **report.provenance}
    ):
        ElementTree.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for model in report.models:
        _case(suite, model)
    if not report.models:
        empty = ElementTree.SubElement(
            suite, "testcase", {"name": "scan", "classname": "gazeguard"}
        )
        ElementTree.SubElement(empty, "error", {"message": "No model was scanned."})
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, model: ScannedModel) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        {
            "name": _clean(model.model),
            "classname": f"gazeguard.{model.method or 'scan'}",
            "time": f"{model.seconds:.3f}",
        },
    )
    if model.outcome == "clean":
        kind = "system-out"
    else:
        kind = "failure" if model.outcome == "flagged" else "error"
    found = ElementTree.SubElement(case, kind)
    if kind != "system-out":
        found.set("type", model.outcome)
        found.set("message", _clean(model.reason))
    evidence = () if model.verdict is None else model.verdict.evidence
    lines = [model.reason, *left_out(model), *(finding.message for finding in evidence)]
    found.text = _clean("\n".join(lines))


def _clean(text: str) -> str:
    """Without the characters that XML forbids."""
    return _NOT_XML.sub("\ufffd", text)
