"""The page of a guarded run: self-contained, with no network access at all.

Its size is bounded whatever the run's: binned scores, at most `MAX_ROWS` rows with thumbnails, at
most `MAX_GALLERY` requests with large pictures. Texts of strangers are made inert as in
`report/html.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard._version import __version__
from gazeguard.jsonable import jsonable
from gazeguard.report import words
from gazeguard.report.guard.model import GuardReport, Request, Reread
from gazeguard.report.guard.pictures import Drawn, View, draw
from gazeguard.report.guard.record import whole_picture_hidden
from gazeguard.report.guard.scores import FEW, ScoreBins, score_bins
from gazeguard.report.guard.text import chance, headline, lede, next_step, promise, seen
from gazeguard.report.html import MAX_GALLERY, MAX_ROWS, embeddable
from gazeguard.report.page import GALLERY_TEXT, SKIPPED_KINDS, TABLE_TEXT, skipped_groups
from gazeguard.report.template import asset, environment, policy, script

MAX_NOT_JUDGED = 100  # rows of the table; their reasons have a list of their own
_NO_HEAT = "no heat map, because they are not on one plain grid"

_SCRIPTS = ("base.js", "plot.js", "table.js", "guard.js")


def render_html(
    report: GuardReport,
    reread: Reread,
    *,
    max_rows: int = MAX_ROWS,
    max_gallery: int = MAX_GALLERY,
) -> str:
    """The whole page as text.

    Args:
        report: what to show.
        reread: reads the samples of given rows once more, for their pictures.
        max_rows: rows in the table: flagged ones first, then some of those that were not judged,
            then the ones nearest to the threshold.
        max_gallery: flagged requests shown large with their heat maps.
    """
    table = _table(report, max_rows)
    gallery = report.flagged[:max_gallery]
    drawn = draw(table, (*gallery, *report.typical), reread)
    bins = score_bins(report)
    few = len(report.scores) <= FEW
    code, style = script(*_SCRIPTS), asset("report.css") + asset("guard.css")
    groups = skipped_groups(report.reasons)
    data = {
        "bins": bins,
        "inputs": {"calibration": len(report.calibration), "requests": report.counts.judged},
        "threshold": report.threshold,
        "points": report.scores if few else None,
        "rows": [_row(request, drawn) for request in table],
    }
    return (
        environment()
        .get_template("guard.html")
        .render(
            headline=headline(report),
            lede=lede(report),
            next_step=next_step(report),
            seen=seen(report),
            promise=promise(report),
            chance=chance(report),
            outcome=report.outcome.value,
            mode=report.mode,
            finished=report.finished,
            counts=report.counts,
            threshold=report.threshold,
            most_divergent=report.most_divergent,
            source=report.source,
            alpha=report.alpha,
            bins=bins,
            bins_alt=_alt(report, bins),
            few=few,
            gallery=[_look(request, drawn) for request in gallery],
            typical=[_look(request, drawn) for request in report.typical],
            shown=len(table),
            outcomes=sorted({_outcome(request) for request in table}),
            groups=groups[:SKIPPED_KINDS],
            groups_hidden=sum(group["count"] for group in groups[SKIPPED_KINDS:]),
            guard=words.flatten(jsonable(report.guard)),
            provenance=words.flatten(jsonable(report.provenance)),
            policy=policy(code, style),
            script=code,
            style=style,
            data=embeddable(data),
            version=__version__,
        )
    )


def _table(report: GuardReport, max_rows: int) -> list[Request]:
    flagged = report.flagged[:max_rows]
    left = max_rows - len(flagged)
    not_judged = report.not_judged[: min(left, MAX_NOT_JUDGED)]
    return [*flagged, *not_judged, *report.clean[: left - len(not_judged)]]


def _outcome(request: Request) -> str:
    return "not judged" if request.score is None else request.outcome.value


def _row(request: Request, drawn: Drawn) -> dict[str, Any]:
    return {
        "row": request.row,
        "id": request.sample_id or "",
        "prompt": words.shorten(request.prompt, TABLE_TEXT),
        "answer": words.shorten(request.answer or "", TABLE_TEXT),
        "outcome": _outcome(request),
        "reason": request.reason,
        "score": request.score,
        "p": request.p_value,
        "image": drawn.small.get(request.row),
    }


def _look(request: Request, drawn: Drawn) -> dict[str, Any]:
    views, images = drawn.large.get(request.row, []), drawn.images.get(request.row, 0)
    return {
        "row": request.row,
        "prompt": words.shorten(request.prompt, GALLERY_TEXT),
        "answer": words.shorten(request.answer or "", GALLERY_TEXT),
        "score": request.score,
        "p": request.p_value,
        "views": views,
        "several": images > 1,
        "notes": [_view_note(request, view, images) for view in views],
        "more_images": images - len(views),
        "note": _note(request),
    }


def _note(request: Request) -> str:
    """What was done about the tokens that stand out."""
    earlier = "the model before its fine-tune answered" if request.earlier else ""
    if request.tokens is None:
        return earlier[:1].upper() + earlier[1:]
    some = _some(request, request.tokens)
    if earlier:
        return f"{some}; {earlier}"
    if whole_picture_hidden(request):
        total = sum(one.size for one in request.tokens)
        some = f"All {total} image tokens were hidden: the answer is blind"
    if all(one.ndim == 1 for one in request.tokens):
        some += f"; {_NO_HEAT}"
    if request.disarmed is False:
        some += "; the answer is the same with nothing hidden"
    return some


def _view_note(request: Request, view: View, images: int) -> str:
    """The same about one image of several."""
    tokens = request.tokens or ()
    if len(tokens) != images:
        return ""
    some = _some(request, [tokens[view.place]])
    return some if view.heat else f"{some}; {_NO_HEAT}"


def _some(request: Request, tokens: Sequence[NDArray[np.bool_]]) -> str:
    every = np.concatenate([one.ravel() for one in tokens])
    what = "were hidden" if request.hidden else "stand out"
    return f"{int(every.sum())} of {every.size} image tokens {what}"


def _alt(report: GuardReport, bins: ScoreBins) -> str:
    counts = report.counts
    return (
        f"Scores from {bins.edges[0]:.3g} to {bins.edges[-1]:.3g}, threshold"
        f" {report.threshold:.3g}: {words.plural(len(report.calibration), 'calibration input')},"
        f" {words.plural(counts.clean, 'clean request')} and"
        f" {words.count(counts.flagged)} flagged."
    )
