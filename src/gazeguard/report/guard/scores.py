"""Bins of one axis for the calibration's scores and a run's, with an edge at the threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gazeguard.report.guard.model import GuardReport
from gazeguard.report.histogram import MAX_BINS, MIN_BINS

FEW = 40  # up to here a run's requests are drawn one by one, not as bars
_LOG_FROM = 8.0  # times between the ends of the axis


@dataclass(frozen=True, slots=True)
class ScoreBins:
    """Counts over bins that are even on the axis.

    Attributes:
        log: whether the axis is logarithmic.
        edges: one more than bins, in the unit of the score; one of them is the threshold.
        calibration: clean calibration inputs per bin.
        clean: requests that were not flagged; none lies beyond the threshold's edge.
        flagged: requests that were; all lie beyond it.
        beyond: inputs outside of the axis, counted in the outermost bins.
    """

    log: bool
    edges: list[float]
    calibration: list[int]
    clean: list[int]
    flagged: list[int]
    beyond: int


def score_bins(report: GuardReport) -> ScoreBins:
    """Bins for the page's chart; their width follows Freedman and Diaconis."""
    known, asked, threshold = report.calibration, report.scores, report.threshold
    flagged = asked[asked > threshold]
    values = np.concatenate([known, asked])
    low = min(float(np.quantile(values, 0.001)), float(known.min()), threshold)
    high = max(float(known.max()), threshold)
    if len(flagged):
        # A lone outlier must not squeeze the rest; a small flagged group must stay in view.
        high = max(high, *np.quantile(values, [0.999]), *np.quantile(flagged, [0.95]))
    log = bool(low > 0 and high / low > _LOG_FROM)
    scale = np.log if log else np.asarray
    start, middle, end = (float(scale(value)) for value in (low, threshold, high))
    if end - start < 1e-9 * max(1.0, abs(end)):
        start, end = start - 0.5, end + 0.5
    shown = np.asarray(scale(values.clip(low, high)), dtype=np.float64)
    quarter, three_quarters = np.quantile(shown, [0.25, 0.75])
    width = 2 * (three_quarters - quarter) / np.cbrt(len(shown))
    bins = np.clip((end - start) / width if width > 0 else MAX_BINS, MIN_BINS, MAX_BINS)
    width = (end - start) / bins
    # Whole bins on both sides of the threshold, and at least one beyond it.
    below = max(1, int(np.ceil((middle - start) / width - 1e-9)))
    above = max(1, int(np.ceil((end - middle) / width - 1e-9)))
    edges = middle + width * np.arange(-below, above + 1)

    def counted(scores: NDArray[np.float64]) -> list[int]:
        place = np.asarray(scale(scores.clip(low, high)), dtype=np.float64)
        at = np.ceil((place - middle) / width).astype(int) - 1 + below
        # Rounding must not move a score across the threshold.
        at = np.where(scores > threshold, at.clip(min=below), at.clip(max=below - 1))
        inside = at.clip(0, below + above - 1)
        return [int(n) for n in np.bincount(inside, minlength=below + above)]

    return ScoreBins(
        log=log,
        edges=(np.exp(edges) if log else edges).tolist(),
        calibration=counted(known),
        clean=counted(asked[asked <= threshold]),
        flagged=counted(flagged),
        beyond=int(((values < low) | (values > high)).sum()),
    )
