"""The page of a scanned vision-language model in a real browser, on wide and narrow screens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gazeguard.report.scan import render_html
from gazeguard.scanning.result import ScannedModel, ScanReport, Status
from gazeguard.types import Finding, Outcome, Verdict
from tests.integration.test_report_browser import browser, pytestmark

__all__ = ["browser", "pytestmark"]


def model(references: int = 19, maps: bool = True) -> ScannedModel:
    rng = np.random.default_rng(0)
    verdict = Verdict(Outcome.FLAGGED, 0.95, 0.95, "conformal", "Flagged.", (Finding("Score."),))
    grid = rng.dirichlet(np.ones(64)).reshape(8, 8).tolist() if maps else []
    figures = {
        "standing": {
            "suspect": 3.0,
            "references": rng.uniform(0.5, 1.5, references).tolist(),
        },
        "by_q": [{"q": 1.0, "score": 3.0, "p_value": 0.05 if references else None}],
        "shift": {"layers": [0, 1, 2], "rows": rng.normal(0, 3, (3, 128)).tolist()},
        "maps": {"suspect": grid, "reference": grid},
    }
    return ScannedModel(
        "adapters/" + "averylongname" * 12,
        Status.DONE,
        "vision-language-model",
        "entropyscan",
        verdict,
        numbers={"score": 3.0},
        figures=figures,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("full", [True, False])
def test_the_page(browser: Any, tmp_path: Path, width: int, scheme: str, full: bool):
    shown = model() if full else model(references=0, maps=False)
    path = tmp_path / "scan.html"
    path.write_text(render_html(ScanReport((shown,), True, {"seed": 0})), "utf-8")
    assert path.stat().st_size < 80_000
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".strip circle").count() == (19 if full else 0)
    drawn = page.locator(".shift").bounding_box()
    assert drawn["width"] > 200
    assert drawn["height"] > 60
    assert page.locator(".maps img").count() == (2 if full else 0)
    box, line = (page.locator(f".strip{part}").bounding_box() for part in ("", " .suspect"))
    assert box["x"] < line["x"] < box["x"] + box["width"]
    context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_a_page_of_both_kinds_explains_both(tmp_path: Path):
    from tests.unit.scan_fixture import full_report

    report = full_report()
    both = dataclasses.replace(report, models=(*report.models, model()))
    page = render_html(both)
    assert "Natural backdoor" in page
    assert "harmless pictures" in page
