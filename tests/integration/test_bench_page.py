"""The benchmark's page in a real browser: pictures follow the page, nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gazeguard.bench.report.table import write_tables
from tests.integration.test_report_browser import brightness, browser, pytestmark
from tests.unit.bench_run_fixture import make_run

__all__ = ["browser", "pytestmark"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("bench") / "run")
    return next(path for path in write_tables(folder) if path.suffix == ".html")


@contextmanager
def opened(browser: Any, path: Path, width: int = 1200, scheme: str = "light") -> Iterator[Any]:
    """The page with everything unfolded; fails on any complaint or request."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    yield page
    context.close()
    assert complaints == []
    assert [url for url in requests if url != path.as_uri() and not url.startswith("data:")] == []


def test_every_level_has_its_pictures_and_tables(browser: Any, table: Path):
    with opened(browser, table) as page:
        assert page.locator("svg.heat").count() == 4
        assert page.locator("#data-vlm-title ~ .charts svg").count() == 2, "trade and rates"
        assert page.locator("#input-vlm-title ~ .charts svg").count() == 2
        assert page.locator("#model-vlm-title ~ .charts svg").count() == 1, "rates alone"
        first = page.locator("svg.heat").first.locator("text").all_text_contents()
        assert first.count("–") == 3, "a failed attack under three defences"
        assert {"bye", "random-drop", "wanet 10 %"} <= set(first)
        assert len([text for text in first if text[:2] in ("0.", "1.")]) == 4 * 3
        for svg in page.locator("svg.plot").all():
            assert svg.get_attribute("role") == "img"
            assert len(svg.get_attribute("aria-label")) > 40
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
        assert len(ids) == len(set(ids))
        used = page.evaluate(
            "[...document.querySelectorAll('use')].map((n) => n.getAttribute('href').slice(1))"
        )
        assert used
        assert set(used) <= set(ids)


def test_numbers_stay_inside_their_cells(browser: Any, table: Path):
    with opened(browser, table) as page:
        outside = page.evaluate(
            """() => [...document.querySelectorAll("svg.plot")].flatMap((svg) => {
              const frame = svg.getBoundingClientRect();
              return [...svg.querySelectorAll("text")].filter((text) => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1
                  || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
              }).map((text) => text.textContent);
            })"""
        )
        assert outside == []


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_only_tables_and_heat_maps_scroll_sideways(browser: Any, table: Path, width: int):
    with opened(browser, table, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for svg in page.locator("svg.chart-plot").all():
            box = svg.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        assert page.locator("svg.heat").first.bounding_box()["width"] > 300, "never made small"
        for region in page.locator(".across").all():
            assert region.get_attribute("tabindex") == "0", "the keyboard can scroll it"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_follow_the_readers_colours(browser: Any, table: Path, scheme: str):
    with opened(browser, table, scheme=scheme) as page:
        ground = brightness(page, "figure", "backgroundColor")
        assert (ground < 0.5) == (scheme == "dark")
        page.evaluate(
            """() => {
              const find = (words) => [...document.querySelectorAll("svg text")]
                .find((text) => text.textContent === words);
              find("random-drop").id = "name";
              find("poisoned rows in %").id = "axis";
            }"""
        )
        assert abs(brightness(page, "#name", "fill") - ground) > 0.6
        assert abs(brightness(page, "#axis", "fill") - ground) > 0.6
        sizes = page.evaluate(
            """[...document.querySelectorAll("svg.heat text")].map(
              (text) => parseFloat(getComputedStyle(text).fontSize))"""
        )
        assert min(sizes) >= 10
