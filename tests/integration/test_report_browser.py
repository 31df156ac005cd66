"""The HTML report in a real browser: what is drawn, what works, and that nothing is fetched."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gazeguard.report.html import write_html
from gazeguard.report.model import CleanReport, Picture
from gazeguard.types import Outcome
from tests.unit.report_fixture import INERT, make_report, thumbnails

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=ARGUMENTS
        )
        yield started
        started.close()


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """The page of `path`; fails on any error, warning of the policy or request to a network."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(10_000)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(f"{m.type}: {m.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.chart:not(:empty)').length > 0")
    yield page
    context.close()
    assert complaints == []
    outside = [url for url in requests if url != path.as_uri() and not url.startswith("data:")]
    assert outside == [], "the page reached outside itself"


def tabbed(page: Any, times: int, otherwise: str) -> Iterator[str]:
    """Press Tab; gives the id of what has the focus, its sort key or `otherwise`."""
    for _ in range(times):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.id || document.activeElement.dataset.sort || " + otherwise
        )
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"focus on {name} cannot be seen"
        yield name


@pytest.fixture(scope="module")
def flagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(make_report(), tmp_path_factory.mktemp("report") / "report.html", thumbnails)


def count(page: Any, selector: str) -> int:
    number: int = page.locator(selector).count()
    return number


def first_rows(page: Any, n: int = 3) -> list[int]:
    texts = page.locator("#rows .c-row").all_inner_texts()[:n]
    return [int(text.split("\n")[0].replace(",", "")) for text in texts]  # its id is below


def test_charts_pictures_and_heat_are_drawn(browser: Any, flagged: Path) -> None:
    with opened(browser, flagged) as page:
        assert page.locator("h1").inner_text().startswith("150 of 1,500 rows look poisoned")
        assert count(page, "#histogram .bar.kept") >= 8
        assert count(page, "#histogram .bar.flagged") >= 5
        assert count(page, "#histogram .curve") == 2
        assert count(page, "#separation .bar") == 6
        assert count(page, "#separation .bar.used") == 2
        assert count(page, "#separation .threshold") == 1
        assert count(page, "#entropy .curve") == 2
        for chart in page.locator(".chart svg").all():
            assert chart.get_attribute("role") == "img"
            assert len(chart.get_attribute("aria-label")) > 20
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        widths = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
        assert len(widths) == 25 + 2 * 13, "25 thumbnails and 13 rows shown twice each"
        assert min(widths) > 0
        assert count(page, ".overlay canvas") == 13


def heat_pixels(page: Any) -> list[int]:
    # A copy is read: reading the page's own canvas again and again makes the browser warn.
    pixels: list[int] = page.evaluate(
        """() => {
          const copy = new OffscreenCanvas(8, 8).getContext("2d", { willReadFrequently: true });
          copy.drawImage(document.querySelector(".suspicious canvas"), 0, 0);
          return [...copy.getImageData(0, 0, 8, 8).data];
        }"""
    )
    return pixels


def test_heat_peaks_at_the_trigger_and_follows_the_layer(browser: Any, flagged: Path) -> None:
    with opened(browser, flagged) as page:
        page.select_option("#heat-layer", "5")
        pixels = heat_pixels(page)
        opacity = pixels[3::4]
        assert opacity.index(max(opacity)) == 4 * 8 + 4, "the patch in the middle is the hottest"
        note = page.locator(".suspicious .heat-note").first.inner_text()
        assert note.startswith("Strongest patch: ")
        page.select_option("#heat-layer", "0")
        assert heat_pixels(page) != pixels
        assert page.locator(".suspicious .heat-note").first.inner_text() != note


def test_each_image_of_a_row_has_its_own_map(browser: Any, tmp_path: Path) -> None:
    report = make_report()
    worst, (one,) = report.gallery[0], report.gallery[0].pictures
    other = {layer: heat[::-1, ::-1] for layer, heat in (one.heat or {}).items()}
    pictures = (one, Picture(one.image), Picture(one.image, other))
    report = dataclasses.replace(
        report, gallery=[dataclasses.replace(worst, pictures=pictures), *report.gallery[1:]]
    )
    with opened(browser, write_html(report, tmp_path / "report.html")) as page:
        card = page.locator(".suspicious").first
        assert [views.locator("canvas").count() for views in card.locator(".views").all()] == [
            1,
            0,
            1,
        ]
        notes = card.locator(".heat-note").all_inner_texts()
        assert notes[0].startswith("Image 1. Strongest patch: ")
        assert notes[1] == "Image 2. No attention map was kept."
        assert notes[2].startswith("Image 3. Strongest patch: ")
        assert page.locator(".suspicious .heat-note").nth(3).inner_text().startswith("Strongest")


def test_filter_sorting_and_paging(browser: Any, flagged: Path) -> None:
    report = make_report()
    rows = sorted(report.rows[report.result.is_flagged].tolist())
    with opened(browser, flagged) as page:
        assert count(page, "#rows tr") == 25
        assert page.locator("#page").inner_text() == "Page 1 of 6"
        values = [
            float(text.removeprefix("> "))
            for text in page.locator("#rows .c-suspicion span").all_inner_texts()
        ]
        assert values == sorted(values, reverse=True)

        page.get_by_role("button", name="Row", exact=True).click()
        assert first_rows(page) == rows[:3]
        header = page.locator("th.c-row[scope=col]")
        assert header.get_attribute("aria-sort") == "ascending"
        assert page.locator("thead .c-suspicion").get_attribute("aria-sort") == "none"
        page.get_by_role("button", name="Row", exact=True).click()
        assert first_rows(page) == rows[::-1][:3]
        assert header.get_attribute("aria-sort") == "descending"

        page.get_by_role("button", name="Next").click()
        assert first_rows(page) == rows[::-1][25:28]
        assert page.locator("#page").inner_text() == "Page 2 of 6"
        for _ in range(9):
            page.get_by_role("button", name="Next").click(force=True)
        assert page.locator("#page").inner_text() == "Page 6 of 6"
        assert page.locator("#next").get_attribute("aria-disabled") == "true"

        page.fill("#filter", f"SHAPE {rows[7]} on")
        assert first_rows(page) == [rows[7]]
        assert page.locator("#found").inner_text() == "1 of 150 rows match"
        page.fill("#filter", f"{rows[-1]:,}")
        assert first_rows(page) == [rows[-1]]
        page.fill("#filter", "no such words")
        assert page.locator("#no-match").is_visible()
        assert count(page, "#rows tr") == 0
        page.fill("#filter", "")
        assert count(page, "#rows tr") == 25
        assert page.locator("#no-match").is_hidden()


def test_everything_is_reached_with_the_keyboard(browser: Any, flagged: Path) -> None:
    with opened(browser, flagged) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.locator(".skip").bounding_box()["y"] >= 0, "a focused skip link is visible"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"

        visited = []
        for name in tabbed(page, 40, "document.activeElement.textContent.trim()"):
            visited.append(name)
            if name == "scale-log":
                page.keyboard.press("Enter")
                assert page.locator("#scale-log").get_attribute("aria-pressed") == "true"
                assert "log scale" in page.locator("#histogram").text_content()
            if name == "row":
                page.keyboard.press("Space")
                assert page.locator("th.c-row[scope=col]").get_attribute("aria-sort") == "ascending"
            if name == "next":
                page.keyboard.press("Enter")
                assert page.locator("#page").inner_text() == "Page 2 of 6"
                assert page.evaluate("document.activeElement.id") == "next"
                break
        wanted = ["scale-linear", "scale-log", "heat-layer", "filter", "row", "suspicion", "next"]
        assert [name for name in visited if name in wanted] == wanted


def report_of(kind: str) -> CleanReport:
    if kind == "flagged":
        long = "https://example.com/" + "verylongwordwithoutabreak" * 12
        report = make_report(prompt=long, provenance={"a_very_long_name" * 4: "f" * 200})
        return dataclasses.replace(report, files={"kept": "folder/" * 30 + "kept.json"})
    return make_report(Outcome(kind), layers=80)


@pytest.mark.parametrize("kind", ["flagged", "clean", "inconclusive"])
@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_never_scroll_sideways(
    browser: Any, tmp_path: Path, kind: str, width: int
) -> None:
    path = write_html(report_of(kind), tmp_path / "report.html", thumbnails)
    with opened(browser, path, viewport={"width": width, "height": 844}) as page:
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for svg in page.locator(".chart svg").all():
            box = svg.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width


def brightness(page: Any, selector: str, name: str) -> float:
    colour = page.evaluate(
        "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]",
        [selector, name],
    )
    parts = colour[colour.index("(") + 1 : -1].replace(",", " ").split()[:3]
    return sum(float(part) for part in parts) / (3 * 255)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_reader(browser: Any, flagged: Path, scheme: str) -> None:
    with opened(browser, flagged, color_scheme=scheme) as page:
        ground, ink = brightness(page, "body", "backgroundColor"), brightness(page, "h1", "color")
        tick = brightness(page, ".tick", "fill")
        if scheme == "dark":
            assert ground < 0.15 < 0.8 < ink
            assert tick > 0.5
        else:
            assert ink < 0.2 < 0.9 < ground
            assert tick < 0.5


def test_reduced_motion_moves_nothing(browser: Any, flagged: Path) -> None:
    with opened(browser, flagged, reduced_motion="reduce") as page:
        durations = page.evaluate(
            "[...document.querySelectorAll('*')]"
            ".map((node) => getComputedStyle(node).transitionDuration)"
        )
        assert set(durations) == {"0s"}


def test_hostile_texts_do_nothing_and_are_shown_as_text(browser: Any, tmp_path: Path) -> None:
    report = make_report(n=60, poisoned=6, prompt=INERT, provenance={"model": INERT})
    report = dataclasses.replace(
        report, gallery=[dataclasses.replace(item, prompt=INERT) for item in report.gallery]
    )
    path = write_html(report, tmp_path / "report.html", thumbnails)
    with opened(browser, path) as page:
        assert page.locator("#rows .c-prompt").first.inner_text() == INERT
        assert page.locator(".asked").nth(1).inner_text() == INERT
        assert count(page, "script") == 2
        assert count(page, "img[onerror]") == 0


@pytest.mark.parametrize("outcome", [Outcome.CLEAN, Outcome.INCONCLUSIVE])
def test_pages_without_removed_rows_work(browser: Any, tmp_path: Path, outcome: Outcome) -> None:
    path = write_html(make_report(outcome, pictures=False), tmp_path / "report.html")
    with opened(browser, path) as page:
        assert count(page, "#histogram .bar.kept") > 3
        assert count(page, "#histogram .bar.flagged") == 0
        assert count(page, "#filter") == 0
        measured = count(page, "#separation .bar")
        assert measured == (6 if outcome is Outcome.CLEAN else 0)


def test_a_small_group_is_shown_on_a_logarithmic_scale(browser: Any, tmp_path: Path) -> None:
    path = write_html(make_report(n=5000, poisoned=25), tmp_path / "report.html")
    with opened(browser, path) as page:
        assert page.locator("#scale-log").get_attribute("aria-pressed") == "true"
        heights = page.evaluate(
            "[...document.querySelectorAll('#histogram .bar.flagged')]"
            ".map((bar) => bar.height.baseVal.value)"
        )
        assert max(heights) > 15, "the small group must be visible"
