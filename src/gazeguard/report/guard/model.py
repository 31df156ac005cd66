"""What the writers of this package need to know about one guarded run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom, binomtest

from gazeguard.types import Outcome, Sample, SkippedRow

# Given row numbers, the samples of those rows that can still be read, one after the other.
Reread = Callable[[Collection[int]], Iterable[Sample]]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request of a run, without its picture.

    Attributes:
        row: 0-based place in the input.
        sample_id: content hash, or None when the row could not be read.
        prompt: the user's words, cut to what a page shows.
        answer: what the model wrote, cut likewise; None when there is no answer.
        outcome: clean, flagged, or inconclusive for a request that was not judged.
        reason: why, as one sentence.
        score: distance from clean inputs; None when it was not judged.
        p_value: as in `GuardVerdict`.
        tokens: per image, its tokens that stand out, as in `GuardVerdict`.
        heat: how much they do, likewise.
        hidden: whether they were hidden from the model.
        disarmed: as in `Guarded`.
        earlier: as in `GuardVerdict`.
    """

    row: int
    sample_id: str | None
    prompt: str
    answer: str | None
    outcome: Outcome
    reason: str
    score: float | None = None
    p_value: float | None = None
    tokens: tuple[NDArray[np.bool_], ...] | None = None
    heat: tuple[NDArray[np.float32], ...] | None = None
    hidden: bool = False
    disarmed: bool | None = None
    earlier: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests by what became of them; `clean + flagged + not_judged = requests`.

    Attributes:
        requests: all.
        clean: judged, and not flagged.
        flagged: judged, and flagged.
        not_judged: neither.
        blinded: flagged requests from which the whole picture was hidden.
        unguarded: requests that were not judged and still answered.
        unchanged: flagged requests whose answer is the same with nothing hidden.
        earlier: flagged requests that the model before its fine-tune answered.
    """

    requests: int
    clean: int
    flagged: int
    not_judged: int
    blinded: int
    unguarded: int
    unchanged: int = 0
    earlier: int = 0

    @property
    def judged(self) -> int:
        """Requests with a score."""
        return self.clean + self.flagged


@dataclass(frozen=True, slots=True, eq=False)
class GuardReport:
    """Everything a report of a guarded run says.

    Attributes:
        mode: `purify`, `detect` or `block`.
        finished: every request was asked.
        counts: requests by outcome.
        threshold: the score above which a request is flagged.
        source: where the threshold comes from.
        alpha: the promised false-alarm rate, on average over calibrations.
        rate_bound: the rate that 95 % of calibrations like this one keep to.
        spread: lowest and highest threshold over splits of the same calibration inputs, or None.
        calibration: float64 `(n,)`, ascending scores of clean inputs.
        scores: float64, one per judged request, in no particular order.
        flagged: flagged requests, furthest from clean first; the first `record.KEPT`.
        clean: the others, nearest to the threshold first; the first `record.KEPT`.
        not_judged: requests without a verdict in input order; the first `record.KEPT`.
        typical: clean requests that lie where the middle of the calibration lies.
        reasons: why requests were not judged, all of them.
        guard: the guard's own settings, as JSON types.
        provenance: what was run on what.
        divergences: float64 `(m,)`, of clean inputs, as in `Guard`; None where the model before
            the fine-tune is not asked.
        most_divergent: what is flagged is above it; None likewise.
    """

    mode: str
    finished: bool
    counts: Counts
    threshold: float
    source: str
    alpha: float
    rate_bound: float
    spread: tuple[float, float] | None
    calibration: NDArray[np.float64]
    scores: NDArray[np.float64]
    flagged: list[Request]
    clean: list[Request]
    not_judged: list[Request]
    typical: list[Request]
    reasons: list[SkippedRow]
    guard: Mapping[str, Any]
    provenance: Mapping[str, Any]
    divergences: NDArray[np.float64] | None = None
    most_divergent: float | None = None

    @property
    def outcome(self) -> Outcome:
        """That of the worst request; never clean for a run that did not finish."""
        if self.counts.flagged:
            return Outcome.FLAGGED
        if self.counts.not_judged or not self.finished or not self.counts.requests:
            return Outcome.INCONCLUSIVE
        return Outcome.CLEAN


def flagged_interval(counts: Counts) -> tuple[float, float] | None:
    """95 % Clopper-Pearson interval of the share of judged requests that are flagged."""
    if not counts.judged:
        return None
    found = binomtest(counts.flagged, counts.judged).proportion_ci(CONFIDENCE, method="exact")
    return float(found.low), float(found.high)


def chance_if_clean(report: GuardReport) -> float | None:
    """How probable so many alarms or more are if every judged request is clean.

    For m clean inputs that are drawn independently and like the n of the calibration, the share
    above the threshold is a beta variable with `(r, n + 1 - r)`, r being the rank of the threshold
    from above, so the number of alarms is beta-binomial. Ties among the scores make it an upper
    bound. Of two witnesses one must have given half of the alarms, so their chances for that add
    up to another.

    Source: Vovk, Conditional validity of inductive conformal predictors (2012), for the share.
    """
    counts = report.counts
    if not counts.judged:
        return None
    judges = [(report.calibration, report.threshold)]
    if report.divergences is not None and report.most_divergent is not None:
        judges.append((report.divergences, report.most_divergent))
    alarms = -(-counts.flagged // len(judges))
    found = 0.0
    for known, threshold in judges:
        n, rank = len(known), np.count_nonzero(known >= threshold)
        found += float(betabinom.sf(alarms - 1, counts.judged, rank, n + 1 - rank))
    return min(1.0, max(0.0, found))
