"""Following a guarded run: what its report needs, and no pictures, however long it is."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from gazeguard.report import words
from gazeguard.report.guard.model import Counts, GuardReport, Request
from gazeguard.types import Outcome, Sample, SkippedRow

if TYPE_CHECKING:
    from gazeguard.guarding import Guard
    from gazeguard.guarding.answer import Guarded

KEPT = 500  # requests of each outcome: as many as the page's table has rows
TYPICAL = 3
TEXT = 500  # characters of a prompt or an answer


class _Best:
    """The few requests of the highest rank, earlier ones among equals."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[tuple[float, int, Request]] = []
        self._added = 0

    def add(self, rank: float, request: Request) -> None:
        self._added += 1
        entry = (rank, -self._added, request)
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def ordered(self) -> list[Request]:
        return [request for _, _, request in sorted(self._heap, reverse=True)]


class Recorder:
    """Takes the requests of a run one by one and gives its report at any time.

    Keeps every score, and for a few requests their words and heat maps; pictures are read again
    when the page is written.
    """

    def __init__(self, guard: Guard, mode: str) -> None:
        self._guard, self._mode = guard, mode
        self._middle = float(np.median(guard.calibration))
        self._scores = array("d")
        self._flagged, self._clean = _Best(KEPT), _Best(KEPT)
        self._typical = _Best(TYPICAL)
        self._not_judged: list[Request] = []
        self._reasons: list[SkippedRow] = []
        self._blinded = self._unguarded = self._unchanged = self._flagged_count = 0
        self._earlier = 0

    def add(self, row: Sample | SkippedRow, found: Guarded | str) -> None:
        """One more request.

        Args:
            row: what was asked, or the row that could not be read.
            found: the answer and its verdict, or why there is none.
        """
        request = _request(row, found)
        if request.score is None:
            self._reasons.append(SkippedRow(request.row, request.reason, request.sample_id))
            self._unguarded += request.answer is not None
            if len(self._not_judged) < KEPT:
                self._not_judged.append(request)
            return
        self._scores.append(request.score)
        if request.outcome is Outcome.FLAGGED:
            self._flagged_count += 1
            self._earlier += request.earlier
            self._blinded += whole_picture_hidden(request)
            self._unchanged += request.disarmed is False
            self._flagged.add(request.score, request)
        else:
            self._clean.add(request.score, request)
            self._typical.add(-abs(request.score - self._middle), request)

    def report(self, provenance: Mapping[str, Any], *, finished: bool) -> GuardReport:
        """What was seen so far."""
        guard, judged, flagged = self._guard, len(self._scores), self._flagged_count
        return GuardReport(
            mode=self._mode,
            finished=finished,
            counts=Counts(
                requests=judged + len(self._reasons),
                clean=judged - flagged,
                flagged=flagged,
                not_judged=len(self._reasons),
                blinded=self._blinded,
                unguarded=self._unguarded,
                unchanged=self._unchanged,
                earlier=self._earlier,
            ),
            threshold=guard.threshold,
            source=guard.source,
            alpha=guard.alpha,
            rate_bound=guard.rate_bound,
            spread=guard.spread,
            calibration=np.asarray(guard.calibration, dtype=np.float64),
            scores=np.array(self._scores, dtype=np.float64),
            flagged=self._flagged.ordered(),
            clean=self._clean.ordered(),
            not_judged=list(self._not_judged),
            typical=self._typical.ordered(),
            reasons=list(self._reasons),
            guard={
                "method": "cleansight",
                "setting": asdict(guard.setting),
                "plan": asdict(guard.plan),
                "samples": guard.counts,
                "seed": guard.seed,
            },
            divergences=guard.divergences,
            most_divergent=guard.most_divergent,
            provenance=provenance,
        )


def whole_picture_hidden(request: Request) -> bool:
    """Whether the model answered without seeing anything of any image."""
    return request.hidden and all(bool(one.all()) for one in request.tokens or ())


def _request(row: Sample | SkippedRow, found: Guarded | str) -> Request:
    prompt = row.prompt if isinstance(row, Sample) else ""
    start = (row.row, row.sample_id, words.shorten(prompt, TEXT))
    if isinstance(found, str):
        return Request(*start, None, Outcome.INCONCLUSIVE, found)
    verdict = found.verdict
    return Request(
        *start,
        None if found.answer is None else words.shorten(found.answer, TEXT),
        verdict.outcome,
        verdict.reason,
        verdict.score,
        verdict.p_value,
        verdict.tokens,
        verdict.heat,
        verdict.hidden,
        found.disarmed,
        verdict.earlier,
    )
