from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import tracemalloc
from collections.abc import Sequence
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gazeguard.data.thumbnails import THUMBNAIL_BYTES, gallery_url, thumbnail_url
from gazeguard.report.heat import heat_bytes
from gazeguard.report.histogram import histogram
from gazeguard.report.html import MAX_ROWS, render_html, write_html
from gazeguard.report.model import Picture
from gazeguard.report.page import skipped_groups
from gazeguard.report.words import flatten, plain, reason_kind, share
from gazeguard.types import Finding, Outcome, SkippedRow, Verdict
from tests.unit.report_fixture import INERT, make_report, scene, thumbnails


class Page(HTMLParser):
    """Tags, visible text and scripts of a page, as an HTML parser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        if tag == "style":
            self.styles.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        if self._inside == "style":
            self.styles[-1] += data

    @property
    def data(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.scripts[0])
        return found


def test_verdict_is_the_first_text_of_the_page() -> None:
    html = render_html(make_report(poisoned=12, skipped=0))
    body = html[html.index("</a>") :]
    assert "12 of 1,500 rows look poisoned and were removed." in body[: body.index("</h1>")]


def test_suspected_rows_are_listed_apart() -> None:
    report = make_report(n=60, poisoned=0, skipped=0)
    report.result.is_suspected[[3, 7]] = True
    counts = {**report.counts, "suspected": 2}
    verdict = Verdict(
        Outcome.FLAGGED, 0.9, 0.5, "x", "2 of 60 rows are suspected: so.", (Finding("they fire"),)
    )
    result = dataclasses.replace(report.result, verdict=verdict)
    html = render_html(dataclasses.replace(report, counts=counts, result=result))
    assert "2 of 60 rows are suspected and kept: nothing was removed." in html
    section = html[html.index('id="suspected-title"') :].partition("</section>")[0]
    assert section.count('<th scope="row">') == 2
    assert "--remove suspected" in section


def test_hostile_texts_are_inert_everywhere() -> None:
    report = make_report(
        n=60, poisoned=6, prompt=INERT, provenance={"model": {INERT: INERT}, "note": INERT}
    )
    report = dataclasses.replace(
        report,
        skipped=[SkippedRow(1, INERT)] * 12,
        answers=[INERT] * len(report.answers),
        gallery=[dataclasses.replace(i, prompt=INERT, answer=INERT) for i in report.gallery],
        files={"kept": INERT},
    )
    report.result.info[INERT] = INERT
    page = Page(render_html(report, thumbnails))
    assert len(page.scripts) == 2, "a prompt opened a script element"
    assert not [tag for tag, attributes in page.tags if "onerror" in attributes]
    rows = page.data["rows"]
    assert isinstance(rows, list)
    assert rows[0]["prompt"] == INERT, "escaping must not change the text"


def test_policy_admits_exactly_our_script_and_style() -> None:
    page = Page(render_html(make_report(n=60, poisoned=6)))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy is not None
    for source in (page.scripts[1], page.styles[0]):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_page_points_nowhere_outside_itself() -> None:
    page = Page(render_html(make_report(n=60, poisoned=6), thumbnails))
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), f"{tag} loads {target}"
        assert "style" not in attributes, "inline styles are blocked by the policy"
    assert "url(" not in page.styles[0]
    assert "@import" not in page.styles[0]


def test_a_hundred_thousand_rows_stay_small(tmp_path: Path) -> None:
    asked: list[int] = []

    def photos(rows: Sequence[int]) -> dict[int, Picture]:
        asked.append(len(rows))
        rng = np.random.default_rng(rows[0])
        noise = rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)  # noise compresses worst
        return {row: Picture(Image.fromarray(noise)) for row in rows}

    text = "A long question about the picture. " * 60
    report = make_report(n=100_000, poisoned=40_000, layers=32, skipped=9_000, prompt=text)
    tracemalloc.start()
    path = write_html(report, tmp_path / "report.html", photos)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size < 5_000_000
    assert peak < 100_000_000
    assert sum(asked) == MAX_ROWS
    assert max(asked) <= 50
    html = path.read_text("utf-8")
    assert "The 500 most suspicious of 40,000 removed rows; all are in" in html


def test_table_shows_the_most_suspicious_rows_first() -> None:
    report = make_report(n=600, poisoned=100)
    rows = Page(render_html(report, max_rows=10)).data["rows"]
    assert isinstance(rows, list)
    got = [row["suspicion"] for row in rows]
    best = np.sort(report.result.suspicion[report.result.is_flagged])[::-1][:10]
    assert got == pytest.approx(best, abs=1e-4)
    assert rows[0]["image"] is None, "without a provider there are no pictures"


@pytest.mark.parametrize("outcome", [Outcome.CLEAN, Outcome.INCONCLUSIVE])
def test_empty_states_say_so(outcome: Outcome) -> None:
    html = render_html(make_report(outcome, pictures=False, skipped=0))
    for sentence in (
        "No row was removed.",
        "There are no pictures to compare.",
        "Every row could be read and measured.",
    ):
        assert sentence in html
    assert "Removed rows, average" not in html


def test_inconclusive_is_never_worded_as_clean() -> None:
    html = render_html(make_report(Outcome.INCONCLUSIVE))
    assert "Could not decide: " in html
    assert "This is not an all-clear" in html
    assert "No sign of poisoning" not in html
    assert "can be used as it is" not in html


def test_page_without_heat_maps_has_no_layer_choice() -> None:
    html = render_html(make_report(n=60, poisoned=6, with_heat=False))
    assert "No attention map was kept" in html
    assert 'id="heat-layer"' not in html


def test_nothing_measured_at_all_still_gives_a_page() -> None:
    report = make_report(Outcome.INCONCLUSIVE, n=12, skipped=12)
    html = render_html(report)
    assert "No row has a score" in html
    everything_nan = make_report(Outcome.INCONCLUSIVE, n=60)
    everything_nan.result.score[:] = np.nan
    everything_nan.entropy[:] = np.nan
    everything_nan.result.suspicion[:] = np.nan
    assert "No row has a score" in render_html(everything_nan)


def test_histogram_counts_every_finite_row_once() -> None:
    result = make_report(n=3000, poisoned=30).result
    result.score[:2] = [np.nan, 1e6]
    bins = histogram(result)
    assert bins is not None
    assert sum(bins.kept) + sum(bins.flagged) == len(result.score) - 1
    assert sum(bins.flagged) == int(result.is_flagged[1:].sum())
    assert bins.missing == 1
    assert bins.beyond >= 1
    assert bins.high < 10, "one outlier must not squeeze the rest into one bin"
    assert bins.low < 3 < bins.high


def test_histogram_of_identical_scores() -> None:
    result = make_report(Outcome.CLEAN, n=100).result
    result.score[:] = 2.0
    result.components = ()
    bins = histogram(result)
    assert bins is not None
    assert bins.low < 2 < bins.high
    assert max(bins.kept) == len(result.score)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (3000, 20), (640, 480)])
def test_thumbnails_are_small_in_any_mode_and_shape(mode: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    url = thumbnail_url(image)
    encoded = base64.b64decode(url.partition(",")[2])
    assert len(encoded) <= THUMBNAIL_BYTES
    opened = Image.open(BytesIO(encoded))
    assert max(opened.size) <= 128
    assert len(gallery_url(image)) < 70_000


def test_small_pictures_stay_pixel_exact() -> None:
    image = scene(3, triggered=True)
    url = gallery_url(image)
    decoded = Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))
    assert (np.asarray(decoded) == np.asarray(image)).all()


def test_heat_keeps_its_peak_and_place_when_averaged_down() -> None:
    grid = np.ones((48, 64), dtype=np.float32)
    grid[40, 60] = 500.0
    heat = heat_bytes(grid)
    assert heat is not None
    assert max(heat["w"], heat["h"]) <= 32
    cells = np.frombuffer(base64.b64decode(heat["data"]), np.uint8).reshape(heat["h"], heat["w"])
    row, column = np.unravel_index(cells.argmax(), cells.shape)
    assert (row / heat["h"], column / heat["w"]) == pytest.approx((40 / 48, 60 / 64), abs=0.05)
    assert heat["peak"] == pytest.approx(500 / grid.sum(), abs=1e-3)


def test_heat_of_several_images_is_on_one_scale() -> None:
    cold, hot = np.full((2, 2), 0.05), np.array([[0.6, 0.1], [0.05, 0.05]])
    drawn = heat_bytes(cold, [hot]), heat_bytes(hot, [cold])
    assert drawn[0] is not None
    assert drawn[1] is not None
    assert [heat["peak"] for heat in drawn if heat] == [0.05, 0.6]
    assert [heat["top"] for heat in drawn if heat] == [0.4, 4.8], "times the even share, an eighth"


def test_rows_with_several_images_show_them_all_with_their_own_heat() -> None:
    report = make_report(n=60, poisoned=6)
    worst = report.gallery[0]
    (one,) = worst.pictures
    several = dataclasses.replace(worst, pictures=(one, Picture(one.image), one, one, one, one))
    html = render_html(dataclasses.replace(report, gallery=[several, *report.gallery[1:]]))
    page = Page(html)
    maps = page.data["heat"][str(worst.row)]
    assert [sorted(layers) for layers in maps] == [[*"012345"], [], [*"012345"], [*"012345"]]
    alts = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert [alt for alt in alts if alt.endswith(f"of row {worst.row}")] == [
        f"Image {n} of row {worst.row}" for n in (1, 2, 3, 4)
    ]
    assert "2 more images are not shown." in html


@pytest.mark.parametrize("grid", [np.zeros((4, 4)), np.full((4, 4), np.nan)])
def test_heat_without_attention_is_left_out(grid: np.ndarray) -> None:
    assert heat_bytes(grid) is None


def test_skipped_rows_group_by_kind_of_reason() -> None:
    rows = [SkippedRow(i, f"Image 'a/{i}.jpg' does not exist.") for i in range(60)]
    rows += [SkippedRow(99, "The row has no image.")]
    groups = skipped_groups(rows)
    assert [group["count"] for group in groups] == [60, 1]
    assert groups[0]["more"] == 20
    assert groups[0]["example"] == "Image 'a/0.jpg' does not exist."


def test_reason_kind_drops_names_and_numbers() -> None:
    assert reason_kind("Line 12 of /tmp/x.json: bad") == reason_kind("Line 9,001 of /y.json: bad")


def test_words_never_round_something_to_nothing() -> None:
    assert share(1, 100_000) == "< 0.1 %"
    assert share(99_999, 100_000) == "> 99.9 %"
    assert share(0, 0) == "0 %"
    assert plain(2.0) == "2"
    assert plain(None) == "–"


def test_every_chart_has_a_text_alternative() -> None:
    page = Page(render_html(make_report()))
    alternatives = [a["data-alt"] for _, a in page.tags if "data-alt" in a]
    assert len(alternatives) == 3
    assert all(alternatives)
    assert re.search(r"150 removed\. .*suspicious rows has mean 2\.65", str(alternatives[0]))


def test_a_component_narrower_than_a_bar_is_named_but_not_drawn() -> None:
    report = make_report()
    narrow = dataclasses.replace(report.result.components[0], std=1e-4)
    report.result.components = (narrow, report.result.components[1])
    html = render_html(report)
    curves = Page(html).data["curves"]
    assert isinstance(curves, list)
    assert [curve["suspicious"] for curve in curves] == [False]
    assert "1 fitted group narrower than a bar" in html
    assert "Fitted: suspicious rows" not in html


def test_the_reading_belongs_to_the_rule_that_ran() -> None:
    report = make_report(n=600, poisoned=60)
    paper = render_html(report)
    assert "the group with the lower entropy is the smaller one" in paper
    assert "Rows that share words in their answers" not in paper
    found = {"phrase": "hello from", "rows": 60, "separation": 4.0, "at_least": 3.5}
    groups = [found | {"asked": 2.5, "separation_before": 1.0}]
    weak = [groups[0] | {"phrase": "sea green", "at_least": 1.2}]
    info = {"groups": groups, "next_best": groups + weak, "separation_asked": "2.5 is needed"}
    result = dataclasses.replace(report.result, rule="robust", info=info)
    page = render_html(dataclasses.replace(report, result=result))
    assert "the group with the lower entropy" not in page
    table = page[page.index('aria-label="Groups of rows"') :]
    table = table[: table.index("</table>")]
    assert table.count("<bdi>hello from</bdi>") == 1, "a removed group is no next best one"
    assert table.count("<td>yes</td>") == 1
    assert table.count("<td>no</td>") == 1
    assert "2.5 is needed." in page


def test_a_clean_page_never_reads_two_hills_as_poison() -> None:
    html = render_html(make_report(Outcome.CLEAN, poisoned=0))
    assert "did not pass as evidence" in html
    assert "two separate hills" not in html
    assert "was removed." not in html[html.index("How the rows divide") : html.index("Where in")]


@pytest.mark.parametrize(
    ("score", "line"), [([0.0, 1.0, 3.0, 4.0], 2.0), ([0.0, 3.5, 3.0, 4.0], None)]
)
def test_a_line_is_drawn_only_where_one_divides_the_rows(
    score: list[float], line: float | None
) -> None:
    report = make_report(n=16, poisoned=2, skipped=12)
    report.result.is_flagged[:] = [True, True, False, False]
    report.result.score[:] = score
    html = render_html(report)
    assert Page(html).data["cut"] == line
    assert ("Rows left of the dashed line were removed." in html) == (line is not None)


def test_rows_are_named_by_number_id_and_file() -> None:
    report = make_report(n=60, poisoned=6)
    page = Page(render_html(report, thumbnails))
    rows = page.data["rows"]
    assert isinstance(rows, list)
    assert [row["file"] for row in rows] == [f"{row['row']:06d}.png" for row in rows]
    assert all(row["id"] for row in rows)


def test_numbers_are_never_raw_json() -> None:
    nested = {"a": None, "b": [1, 2.5], "c": [{"x": True}, {"x": []}], "d": [[1, 2], [3, 4]]}
    assert flatten(nested) == [
        ("a", "none"),
        ("b", "1, 2.5"),
        ("c.1.x", "yes"),
        ("c.2.x", "none"),
        ("d", "1, 2; 3, 4"),
    ]
