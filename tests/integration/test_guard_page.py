"""The page of a guarded run in a real browser, and the command that writes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gazeguard.cli.main import run
from gazeguard.data.read import open_dataset
from gazeguard.guarding import Guard
from gazeguard.guarding.answer import answer
from gazeguard.lab.poison import write_set
from gazeguard.lab.rows import Row
from gazeguard.models.target import Target
from gazeguard.report.files import write_atomic
from gazeguard.report.guard import render_html
from gazeguard.types import Sample
from tests.contract.guards import sample
from tests.integration import test_report_browser as pages
from tests.unit.guard_fixture import Run, make_run
from tests.unit.report_fixture import INERT

browser = pages.browser
needs_browser = pytest.mark.skipif(
    pages.CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)


def written(made: Run, path: Path, *, finished: bool = True) -> Path:
    return write_atomic(path, render_html(made.report(finished=finished), made.reread))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(make_run(), tmp_path_factory.mktemp("page") / "guard.html")


def scores(page: Any) -> list[float]:
    texts = page.locator("#rows .c-score").all_inner_texts()
    return [float(text) for text in texts if text != "–"]


@needs_browser
def test_chart_thumbnails_and_heat_are_drawn(browser: Any, mixed: Path) -> None:
    with pages.opened(browser, mixed) as page:
        assert page.locator("h1").inner_text().startswith("153 requests, mode purify: 30 flagged")
        assert pages.count(page, "#scores .bar.kept") > 5
        assert pages.count(page, "#scores .bar.flagged") > 5
        assert pages.count(page, "#scores .outline") == 1
        x = page.locator("#scores .threshold").bounding_box()["x"]
        kept = [bar.bounding_box() for bar in page.locator("#scores .bar.kept").all()]
        flagged = [bar.bounding_box() for bar in page.locator("#scores .bar.flagged").all()]
        assert max(box["x"] + box["width"] for box in kept) <= x + 1
        assert min(box["x"] for box in flagged) >= x - 1
        assert len(page.locator("#scores svg").get_attribute("aria-label")) > 40
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        widths = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
        assert len(widths) == 25 + 2 * 12 + 3, "thumbnails, 12 pairs and 3 typical requests"
        assert min(widths) > 0
        pair = page.locator(".suspicious").first.locator("img")
        assert pair.nth(0).get_attribute("src") != pair.nth(1).get_attribute("src")
        box = [pair.nth(i).bounding_box() for i in (0, 1)]
        assert box[0]["y"] == box[1]["y"], "the picture and its heat stand side by side"


@needs_browser
def test_each_image_stands_beside_its_own_heat(browser: Any, tmp_path: Path) -> None:
    made = make_run(3, 2)
    tokens = np.zeros((8, 8), bool)
    made.judged(9 * made.guard.threshold, images=3, more=(tokens, np.zeros(9, bool)))
    with pages.opened(browser, written(made, tmp_path / "guard.html")) as page:
        card = page.locator(".suspicious").first
        assert pages.count(page, ".suspicious:first-child .views") == 3
        boxes = [image.bounding_box() for image in card.locator("img").all()]
        assert len(boxes) == 5, "two pairs, and one without a grid"
        for bare, heat in (boxes[:2], boxes[2:4]):
            assert bare["y"] == heat["y"]
            assert bare["x"] + bare["width"] <= heat["x"]
        assert boxes[1]["y"] + boxes[1]["height"] <= boxes[2]["y"], "images below each other"
        assert boxes[4]["width"] == pytest.approx(boxes[0]["width"], abs=1)
        notes = card.locator(".heat-note").all_inner_texts()
        assert notes[1] == "Image 2: 0 of 64 image tokens were hidden"


@needs_browser
def test_filter_outcome_sorting_and_paging(browser: Any, mixed: Path) -> None:
    with pages.opened(browser, mixed) as page:
        assert page.locator("#page").inner_text() == "Page 1 of 7"
        assert scores(page) == sorted(scores(page), reverse=True)
        assert set(page.locator("#rows .c-outcome").all_inner_texts()) == {"flagged"}
        page.get_by_role("button", name="Next").click()
        assert page.locator("#rows .c-outcome").all_inner_texts()[:6] == ["flagged"] * 5 + ["clean"]

        page.select_option("#outcome", "not judged")
        assert page.locator("#found").inner_text() == "3 of 153 rows match"
        assert pages.count(page, "#rows tr") == 3
        assert page.locator("#rows .c-outcome").first.get_attribute("title").startswith("image not")
        page.select_option("#outcome", "clean")
        assert page.locator("#found").inner_text() == "120 of 153 rows match"
        page.fill("#filter", "answer 11")
        shown = page.locator("#rows .c-answer").all_inner_texts()
        assert shown
        assert all("answer 11" in text for text in shown)
        page.fill("#filter", "no such words")
        assert page.locator("#no-match").is_visible()
        page.fill("#filter", "")
        page.select_option("#outcome", "")

        page.get_by_role("button", name="Row", exact=True).click()
        assert pages.first_rows(page) == [0, 1, 2]
        page.get_by_role("button", name="Score", exact=True).click()
        page.get_by_role("button", name="Score", exact=True).click()
        assert page.locator("thead .c-score").get_attribute("aria-sort") == "ascending"
        assert scores(page) == sorted(scores(page))


@needs_browser
def test_everything_is_reached_with_the_keyboard(browser: Any, mixed: Path) -> None:
    with pages.opened(browser, mixed) as page:
        visited = []
        otherwise = "document.activeElement.className || document.activeElement.tagName"
        for name in pages.tabbed(page, 30, otherwise):
            visited.append(name)
            if name == "scale-log":
                page.keyboard.press("Enter")
                assert page.locator("#scale-log").get_attribute("aria-pressed") == "true"
                assert "(log)" in page.locator("#scores").text_content()
            if name == "outcome":
                page.keyboard.press("c")
                assert page.locator("#found").inner_text() == "120 of 153 rows match"
            if name == "next":
                page.keyboard.press("Enter")
                assert page.locator("#page").inner_text() == "Page 2 of 5"
                break
        wanted = ["skip", "scale-linear", "scale-log", "filter", "outcome", "row", "score", "next"]
        assert [name for name in visited if name in wanted] == wanted


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_never_scroll_sideways(browser: Any, tmp_path: Path, width: int) -> None:
    made = make_run(30, 8, prompt="https://example.com/" + "verylongword" * 20)
    made.unread("image not found: " + "folder/" * 40)
    everything = np.ones((8, 8), bool)
    made.judged(9 * made.guard.threshold, images=6, more=(everything,) * 5)
    path = written(made, tmp_path / "guard.html")
    with pages.opened(browser, path, viewport={"width": width, "height": 844}) as page:
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#scores svg").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        label = page.locator("#scores .limit").bounding_box()
        assert label["x"] >= 0
        assert label["x"] + label["width"] <= width


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_reader(browser: Any, mixed: Path, scheme: str) -> None:
    with pages.opened(browser, mixed, color_scheme=scheme) as page:
        ground = pages.brightness(page, "body", "backgroundColor")
        outline = pages.brightness(page, "#scores .outline", "stroke")
        tag = pages.brightness(page, ".c-outcome.flagged", "color")
        assert abs(outline - ground) > 0.6
        assert abs(tag - ground) > 0.4
        assert (ground < 0.5) == (scheme == "dark")


@needs_browser
@pytest.mark.parametrize(
    ("made", "bars", "points"),
    [
        (make_run(60, 0, 0), True, 0),
        (make_run(0, 60, 0), True, 0),
        (make_run(0, 0, 5), False, 0),
        (make_run(1, 0, 0), False, 1),
        (make_run(4, 3, 0, far=50.0), False, 7),
        (make_run(200, 50, far=50.0), True, 0),
        (make_run(0, 0, 0), False, 0),
    ],
    ids=["none-flagged", "all-flagged", "none-judged", "one", "few", "far", "nothing"],
)
def test_other_runs_give_a_page_without_errors(
    browser: Any, tmp_path: Path, made: Run, bars: bool, points: int
) -> None:
    with pages.opened(browser, written(made, tmp_path / "guard.html")) as page:
        assert (pages.count(page, "#scores .bar") > 3) == bars
        assert pages.count(page, "#scores .point") == points
        assert pages.count(page, "#scores .tick") >= 5
        for scale in ("#scale-log", "#scale-linear"):
            page.click(scale)
            ticks = page.locator("#scores .tick").all_text_contents()
            assert not [text for text in ticks if "NaN" in text or "Infinity" in text]
            boxes = page.locator("#scores .bar").all()
            assert all(box.bounding_box()["height"] > 0 for box in boxes)


@needs_browser
def test_hostile_texts_are_shown_as_text(browser: Any, tmp_path: Path) -> None:
    made = make_run(6, 3, 0, prompt=INERT)
    made.unread(INERT)
    with pages.opened(browser, written(made, tmp_path / "guard.html")) as page:
        assert page.locator("#rows .c-prompt").first.inner_text() == INERT
        assert pages.count(page, "script") == 2
        assert pages.count(page, "img[onerror]") == 0


# The command, on a tiny random model whose guard flags half of what it is asked.


@pytest.fixture(scope="module")
def rigged(target: Target, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, set[int]]:
    """A guard, a data set of six requests whose last picture is broken, and the flagged rows."""
    root = tmp_path_factory.mktemp("run")
    pictures = np.random.default_rng(5).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    question = "what is it?"
    write_set([Row(pixels, question, "red", "colour") for pixels in pictures], root / "set")
    (root / "set" / "images" / "000005.png").write_bytes(b"not a picture")
    clean = [sample(i, question + " really" * (i % 3)) for i in range(40)]
    guard = Guard.calibrate(target, clean, alpha=0.05, batch_size=20)
    rows = open_dataset(root / "set" / "data.json").rows()
    asked = [row for row in rows if isinstance(row, Sample)]
    found = np.array([g.verdict.score for g in answer(guard, asked, max_new_tokens=1)], float)
    middle = float(np.median(found))
    saved = guard._saved
    arrays = saved.arrays | {"calibration": np.linspace(middle * 0.5, middle, 20)}
    made = Guard(target, replace(saved, arrays=arrays))
    assert made.threshold == middle
    made.save(root / "guard")
    return root / "guard", root / "set" / "data.json", {*np.flatnonzero(found > middle).tolist()}


def ask(llava: Path, guard: Path, *options: str) -> int:
    return run(["guard", str(llava), "--guard", str(guard), "--max-new-tokens", "3", *options])


def test_a_data_set_gives_page_and_json_and_the_same_lines(llava, rigged, tmp_path, capsys):
    guard, data, flagged = rigged
    asked = ("--data", str(data), "--batch-size", "2")
    assert ask(llava, guard, *asked) == 1
    plain = capsys.readouterr().out
    html, report = tmp_path / "out" / "run.html", tmp_path / "out" / "run.json"
    assert ask(llava, guard, *asked, "--html-output", str(html), "--json-output", str(report)) == 1
    printed = capsys.readouterr()
    assert printed.out == plain
    assert f"Report: {html}" in printed.err
    assert "Answering 6 rows." in printed.err
    loaded = json.loads(report.read_text())
    assert loaded["finished"]
    assert loaded["counts"] | {"blinded": 0, "unchanged": 0} == {
        "requests": 6,
        "clean": 5 - len(flagged),
        "flagged": len(flagged),
        "not_judged": 1,
        "blinded": 0,
        "unguarded": 0,
        "unchanged": 0,
        "earlier": 0,
    }
    assert loaded["provenance"]["data"]["rows"] == 6
    assert loaded["provenance"]["arguments"]["batch_size"] == 2
    text = html.read_text()
    assert loaded["summary"] in text
    data_ = text[text.index('id="report-data">') + len('id="report-data">') :]
    rows = json.loads(data_[: data_.index("</script>")])["rows"]
    assert {row["row"] for row in rows if row["outcome"] == "flagged"} == flagged
    assert [row["row"] for row in rows if row["image"] is None] == [5]
    assert text.count('class="look suspicious"') == len(flagged)
    assert text.count('alt="The same with heat.') == len(flagged)


def test_one_picture_gives_a_page_too(llava, rigged, tmp_path, capsys):
    guard, data, flagged = rigged
    picture = data.parent / "images" / f"{min(flagged):06d}.png"
    html, report = tmp_path / "one.html", tmp_path / "one.json"
    files = ("--html-output", str(html), "--json-output", str(report))
    asked = ("--image", str(picture), "--prompt", "what is it?", *files)
    assert ask(llava, guard, *asked, "--json") == 1
    assert json.loads(capsys.readouterr().out)["outcome"] == "flagged"
    assert json.loads(report.read_text())["provenance"]["data"] is None
    assert 'alt="The same with heat.' in html.read_text()


def test_a_run_that_is_stopped_says_so(llava, rigged, tmp_path, capsys, monkeypatch):
    guard, data, _ = rigged
    calls = []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(*args, **kwargs)

    monkeypatch.setattr("gazeguard.guarding.answer.answer", stopped)
    html, report = tmp_path / "run.html", tmp_path / "run.json"
    options = ("--data", str(data), "--batch-size", "2", "--html-output", str(html))
    assert ask(llava, guard, *options, "--json-output", str(report)) == 130
    loaded = json.loads(report.read_text())
    assert not loaded["finished"]
    assert loaded["outcome"] != "clean"
    assert loaded["counts"]["requests"] == 2 == len(capsys.readouterr().out.splitlines())
    assert "The run did not finish: 2 requests" in html.read_text()


def test_files_that_cannot_be_written_end_the_run_before_it_begins(
    llava, rigged, tmp_path, capsys, monkeypatch
):
    guard, data, _ = rigged
    monkeypatch.setattr("gazeguard.guarding.answer.answer", pytest.fail)
    (tmp_path / "file").write_text("")
    page = str(tmp_path / "page.html")
    picture = str(data.parent / "images" / "000000.png")
    for options, words in (
        (("--html-output", str(tmp_path / "file" / "page.html")), "another output folder"),
        (("--html-output", str(tmp_path)), "is a directory"),
        (("--json-output", str(data)), "is taken already"),
        (("--html-output", page, "--json-output", page), "is taken already"),
    ):
        assert ask(llava, guard, "--data", str(data), *options) == 2
        printed = capsys.readouterr()
        assert words in " ".join(printed.err.split())
        assert "Traceback" not in printed.err
        assert printed.out == ""
    asked = ("--image", picture, "--prompt", "what?", "--html-output", picture)
    assert ask(llava, guard, *asked) == 2
    assert Image.open(picture).size == (32, 32), "the picture is as it was"
