"""The report of a guarded run: what it says, what it keeps, and how large it gets."""

from __future__ import annotations

import gc
import json
import tracemalloc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources

import jsonschema
import numpy as np
import pytest
from PIL import Image
from scipy.stats import beta

from gazeguard.calibrate import conformal_threshold
from gazeguard.guarding.answer import Guarded
from gazeguard.report.guard import GuardReport, render_html, render_json
from gazeguard.report.guard.model import Counts, chance_if_clean, flagged_interval
from gazeguard.report.guard.scores import score_bins
from gazeguard.report.guard.text import chance, headline, lede
from gazeguard.types import Outcome, Sample
from tests.unit.guard_fixture import CALIBRATION, Run, make_guard, make_run
from tests.unit.report_fixture import INERT
from tests.unit.test_report_html import Page

SCHEMA = json.loads(
    resources.files("gazeguard.report").joinpath("schema", "guard-report-1.json").read_text()
)
HIDDEN = "answered with the image parts that stood out hidden"
CASES = {
    "mixed": (make_run(), f"153 requests, mode purify: 30 flagged and {HIDDEN}, 3 not judged"),
    "calm": (make_run(9, 0, 0), "9 requests, mode purify: none flagged"),
    "all": (make_run(0, 4, 0), f"4 requests, mode purify: 4 flagged and {HIDDEN}"),
    "detect": (
        make_run(2, 1, 0, "detect"),
        "3 requests, mode detect: 1 flagged and answered like all others",
    ),
    "block": (make_run(2, 1, 0, "block"), "3 requests, mode block: 1 flagged and not answered"),
    "doubtful": (make_run(5, 0, 1), "6 requests, mode purify: none flagged, 1 not judged"),
    "unread": (make_run(0, 0, 12), "12 requests, mode purify: none could be judged"),
    "one": (make_run(1, 0, 0), "1 request, mode purify: none flagged"),
    "nothing": (make_run(0, 0, 0), "No request was answered, mode purify"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_the_first_line_of_the_page(name: str) -> None:
    run, expected = CASES[name]
    report = run.report()
    assert headline(report) == expected
    html = render_html(report, run.reread)
    start = html[html.index("</a>") : html.index("</h1>")]
    assert f"{expected}." in start


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("finished", [True, False])
def test_json_follows_the_shipped_schema(name: str, finished: bool) -> None:
    report = CASES[name][0].report(finished=finished)
    loaded = json.loads(render_json(report), parse_constant=lambda name: pytest.fail(name))
    jsonschema.validate(loaded, SCHEMA)
    counts = loaded["counts"]
    assert counts["clean"] + counts["flagged"] + counts["not_judged"] == counts["requests"]
    assert loaded["scores"]["requests"]["n"] == counts["clean"] + counts["flagged"]
    assert loaded["threshold"] == conformal_threshold(CALIBRATION, 0.01)
    assert sum(group["count"] for group in loaded["not_judged"]) == counts["not_judged"]


def test_the_schema_would_notice() -> None:
    loaded = json.loads(render_json(CASES["mixed"][0].report()))
    for name, wrong in {"outcome": "fine", "mode": "allow", "alpha": 2, "finished": 1}.items():
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**loaded, name: wrong}, SCHEMA)


@pytest.mark.parametrize(
    ("name", "finished", "expected"),
    [
        ("mixed", True, Outcome.FLAGGED),
        ("mixed", False, Outcome.FLAGGED),
        ("calm", True, Outcome.CLEAN),
        ("calm", False, Outcome.INCONCLUSIVE),
        ("doubtful", True, Outcome.INCONCLUSIVE),
        ("unread", True, Outcome.INCONCLUSIVE),
        ("nothing", True, Outcome.INCONCLUSIVE),
    ],
)
def test_only_a_finished_run_with_every_request_judged_is_clean(
    name: str, finished: bool, expected: Outcome
) -> None:
    run = CASES[name][0]
    report = run.report(finished=finished)
    assert report.outcome is expected
    page = render_html(report, run.reread)
    assert ("can be used as they are" in page) == (expected is Outcome.CLEAN)
    assert ("did not finish" in page) == (not finished and name != "nothing")


def test_what_became_of_requests_that_were_not_judged() -> None:
    run = make_run(3, 0, 0)
    run.unguarded()
    assert "1 request was not judged" in lede(run.report())
    assert "it was answered without protection" in lede(run.report())
    run.unread()
    assert "1 of them answered without protection, the others not at all" in lede(run.report())
    page = render_html(run.report(), run.reread)
    assert "numbers are not finite" in page
    assert "image not found" in page
    only_unread = make_run(3, 0, 2)
    assert "they were not answered" in lede(only_unread.report())


def test_an_answer_without_any_picture_is_called_blind() -> None:
    run = make_run(3, 1, 0)
    assert "blind" not in lede(run.report())
    run.judged(run.guard.threshold + 1, whole=True)
    report = run.report()
    assert report.counts.blinded == 1
    assert "From 1 flagged request the whole picture was hidden" in lede(report)
    assert "All 64 image tokens were hidden: the answer is blind" in render_html(report, run.reread)


def test_interval_of_the_flagged_share_by_hand() -> None:
    def counts(flagged: int, clean: int) -> Counts:
        return Counts(flagged + clean, clean, flagged, 0, 0, 0)

    assert flagged_interval(counts(0, 0)) is None
    assert flagged_interval(counts(0, 50)) == pytest.approx((0, 1 - 0.025 ** (1 / 50)))
    assert flagged_interval(counts(50, 0)) == pytest.approx((0.025 ** (1 / 50), 1))
    assert flagged_interval(counts(3, 97)) == pytest.approx(
        (beta.ppf(0.025, 3, 98), beta.ppf(0.975, 4, 97))
    )


def test_chance_of_alarms_is_that_of_clean_runs() -> None:
    """4,000 calibrations on clean scores, each with a run of clean requests."""
    rng, at_least, reports = np.random.default_rng(0), 5, 4000
    alarms = np.zeros(reports)
    for i in range(reports):
        known = np.sort(rng.normal(size=199))
        alarms[i] = (rng.normal(size=150) > conformal_threshold(known, 0.01)).sum()
    report = replace(
        CASES["calm"][0].report(), counts=Counts(150, 150 - at_least, at_least, 0, 0, 0)
    )
    expected = (alarms >= at_least).mean()
    assert chance_if_clean(report) == pytest.approx(expected, abs=0.015)
    assert 0.02 < expected < 0.2, "far from the ends, or the comparison says nothing"
    many = replace(report, counts=Counts(150, 120, 30, 0, 0, 0))
    assert chance(many).endswith("less than 0.001.")
    assert "could be chance" not in chance(many)
    one = chance(replace(report, counts=Counts(150, 149, 1, 0, 0, 0)))
    assert one.startswith("By number alone this could be chance")
    none = replace(report, counts=Counts(150, 150, 0, 0, 0, 0))
    assert chance(none) == ""
    assert chance_if_clean(none) == 1.0
    assert chance_if_clean(CASES["unread"][0].report()) is None


def test_bins_hold_every_score_on_its_side_of_the_threshold() -> None:
    report = make_run(400, 60, 2, far=0.6).report()
    bins = score_bins(report)
    assert not bins.log
    at = int(np.abs(np.array(bins.edges) - report.threshold).argmin())
    assert bins.edges[at] == pytest.approx(report.threshold)
    assert (sum(bins.calibration), sum(bins.clean), sum(bins.flagged)) == (199, 400, 60)
    assert sum(bins.clean[at:]) == sum(bins.flagged[:at]) == 0
    inside = (report.scores > bins.edges[3]) & (report.scores <= bins.edges[4])
    assert bins.clean[3] == inside.sum()


def with_scores(report: GuardReport, scores: list[float]) -> GuardReport:
    return replace(report, scores=np.array(scores))


def test_the_axis_is_logarithmic_when_scores_spread_over_orders() -> None:
    run = make_run(200, 40, far=40.0)
    bins = score_bins(run.report())
    assert bins.log
    ratios = np.array(bins.edges[1:]) / bins.edges[:-1]
    assert ratios == pytest.approx(ratios[0])
    assert sum(n > 0 for n in bins.flagged) > 5, "flagged scores spread over bins"
    assert sum(n > 0 for n in bins.clean) > 5, "and so do clean ones"
    zero = with_scores(run.report(), [0.0] * 9 + [*run.report().scores])
    assert not score_bins(zero).log, "zero has no place on a logarithmic axis"


def test_a_lone_outlier_does_not_squeeze_the_rest() -> None:
    report = make_run(3000, 60, 0).report()
    bins = score_bins(with_scores(report, [*report.scores, 1e9]))
    assert bins.beyond >= 1
    assert bins.edges[-1] < 10 * report.threshold
    assert sum(bins.flagged) == 61


@pytest.mark.parametrize("scores", [[], [2.0], [2.0] * 50])
def test_scores_and_calibration_without_any_spread(scores: list[float]) -> None:
    guard = make_guard(np.full(199, 2.0))
    run = Run(guard=guard)
    for score in scores:
        run.judged(score)
    bins = score_bins(run.report())
    assert np.isfinite(bins.edges).all()
    assert max(bins.calibration) == 199
    assert sum(bins.clean) == len(scores)
    assert render_html(run.report(), run.reread)


def test_table_shows_flagged_then_nearest_and_says_what_it_leaves_out() -> None:
    run = make_run(80, 15, 40)
    rows = Page(render_html(run.report(), run.reread, max_rows=40)).data["rows"]
    assert isinstance(rows, list)
    outcomes = [row["outcome"] for row in rows]
    assert outcomes == ["flagged"] * 15 + ["not judged"] * 25
    scores = [row["score"] for row in rows[:15]]
    assert scores == sorted(scores, reverse=True)
    assert [row["image"] is None for row in rows] == [False] * 15 + [True] * 25

    run = make_run(80, 15, 2)
    page = render_html(run.report(), run.reread, max_rows=40)
    rows = Page(page).data["rows"]
    assert isinstance(rows, list)
    nearest = np.sort(run.report().scores[run.report().scores <= run.guard.threshold])[::-1]
    assert [row["score"] for row in rows[17:]] == nearest[:23].tolist()
    assert "40 of 97 requests: flagged ones first" in page


def test_typical_requests_lie_in_the_middle_of_the_calibration() -> None:
    report = make_run(300, 10).report()
    middle = np.median(CALIBRATION)
    away = np.sort(np.abs(report.scores - middle))[:3]
    found = [abs(request.score - middle) for request in report.typical if request.score]
    assert found == pytest.approx(away)


def test_pictures_with_heat_without_and_changed_since() -> None:
    run = Run()
    run.judged(run.guard.threshold + 3)
    run.judged(run.guard.threshold + 2, grid=(128,))
    run.judged(run.guard.threshold + 1)
    run.samples[2] = lambda: replace(run.samples[0](), row=2)
    page = Page(render_html(run.report(), run.reread))
    shown = [a for tag, a in page.tags if tag == "img"]
    assert [a["alt"] for a in shown] == [
        "Image of row 0",
        "The same with heat. 1 of 64 image tokens were hidden.",
        "Image of row 1",
    ]
    assert len({a["src"] for a in shown}) == 3
    rows = page.data["rows"]
    assert isinstance(rows, list)
    assert [row["image"] is None for row in rows] == [False, False, True]
    html = render_html(run.report(), run.reread)
    assert "1 of 128 image tokens were hidden; no heat map" in html


def test_each_image_of_a_request_has_its_own_heat() -> None:
    run = Run()
    square, tiles = np.zeros((4, 4), bool), np.zeros(20, bool)
    square[0, :3] = True
    run.judged(run.guard.threshold + 3, images=3, more=(square, tiles))
    page = Page(render_html(run.report(), run.reread))
    shown = [a for tag, a in page.tags if tag == "img"]
    assert [a["alt"] for a in shown] == [
        "Image 1 of row 0",
        "The same with heat. 1 of 64 image tokens were hidden.",
        "Image 2 of row 0",
        "The same with heat. 3 of 16 image tokens were hidden.",
        "Image 3 of row 0",
    ]
    assert len({a["src"] for a in shown}) == 5
    html = render_html(run.report(), run.reread)
    assert "4 of 100 image tokens were hidden<" in html
    assert "Image 3: 0 of 20 image tokens were hidden; no heat map" in html
    assert run.report().counts.blinded == 0


def test_images_that_could_not_be_told_apart_are_shown_bare() -> None:
    run = Run()
    run.judged(run.guard.threshold + 3, images=2, grid=(128,))
    run.judged(2.0, images=2)
    html = render_html(run.report(), run.reread)
    assert "1 of 128 image tokens were hidden; no heat map" in html
    assert html.count('<p class="heat-note muted">Image 2</p>') == 2
    assert "The same with heat" not in html


def test_of_many_images_those_that_stand_out_are_shown() -> None:
    run = Run()
    calm, picked = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    run.judged(run.guard.threshold + 3, images=7, more=(calm, calm, calm, calm, picked, calm))
    html = render_html(run.report(), run.reread)
    shown = [a["alt"] for tag, a in Page(html).tags if tag == "img" and "row" in a["alt"]]
    assert shown == [f"Image {n} of row 0" for n in (1, 2, 3, 6)]
    assert "3 more images are not shown." in html


def test_a_request_is_blind_only_without_any_of_its_images() -> None:
    run = Run()
    everything = np.ones((2, 2), bool)
    run.judged(run.guard.threshold + 3, images=2, more=(everything,))
    assert run.report().counts.blinded == 0
    run.judged(run.guard.threshold + 2, images=2, more=(everything,), whole=True)
    assert run.report().counts.blinded == 1


def test_what_stands_out_is_not_called_hidden_when_it_was_not() -> None:
    for mode in ("detect", "block"):
        run = make_run(2, 2, 0, mode)
        html = render_html(run.report(), run.reread)
        assert "1 of 64 image tokens stand out" in html
        assert "tokens were hidden" not in html
        assert "Hidden from the model" not in html


def test_hostile_texts_are_inert_everywhere() -> None:
    run = make_run(10, 5, 0, prompt=INERT)
    run.unread(INERT)
    page = Page(render_html(run.report(provenance={INERT: {INERT: INERT}}), run.reread))
    assert len(page.scripts) == 2, "a text opened a script element"
    assert not [tag for tag, attributes in page.tags if "onerror" in attributes]
    rows = page.data["rows"]
    assert isinstance(rows, list)
    assert rows[0]["prompt"] == INERT, "escaping must not change the text"


def test_page_points_nowhere_outside_itself() -> None:
    run = make_run()
    page = Page(render_html(run.report(), run.reread))
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), f"{tag} loads {target}"
        assert "style" not in attributes, "inline styles are blocked by the policy"


def test_no_picture_is_kept_and_they_are_read_again_one_by_one() -> None:
    run = Run()
    seen = [weakref.ref(run.judged(score).images[0]) for score in (3.0, 20.0, 5.0, 30.0)]
    gc.collect()
    assert not any(ref() for ref in seen), "the recorder holds a picture"

    for score in np.linspace(1.0, 20.0, 60):
        run.judged(float(score))
    again: list[weakref.ref] = []

    def watched(wanted) -> Iterator[Sample]:
        for sample in run.reread(wanted):
            again.append(weakref.ref(sample.images[0]))
            assert sum(ref() is not None for ref in again) <= 2
            yield sample

    render_html(run.report(), watched)
    assert len(again) == 64, "every row is read once"


@pytest.mark.slow
def test_a_hundred_thousand_requests_stay_small() -> None:
    run = Run()
    long = "A long question about the picture. " * 60
    scores = np.random.default_rng(0).gamma(30.0, 0.2, 100_000)
    run.judged(float(scores[0]), long)
    sample = run.samples[0]()
    tracemalloc.start()
    for score in scores[1:]:
        run._row += 1
        verdict = run.guard.judge(float(score))
        run.recorder.add(replace(sample, row=run._row), Guarded(long, verdict))
    report = run.report()
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    asked: list[int] = []

    def reread(wanted) -> Iterator[Sample]:
        asked.extend(wanted)
        return (replace(sample, row=row, images=(picture,)) for row in wanted)

    html = render_html(report, reread)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.counts.flagged > 500
    assert len(html) < 5_000_000
    assert peak < 100_000_000
    assert len(asked) == 503, "rows of the table and three typical ones"
    assert "500 of 100,000 requests" in html
