"""Binning the per-row score so that a page of fixed size can draw 100,000 rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gazeguard.types import CleaningResult, Component

MIN_BINS, MAX_BINS = 24, 72


@dataclass(frozen=True, slots=True)
class Histogram:
    """Row counts over equal bins of the score, in the score's unit.

    Rows beyond the ends are counted in the outermost bins (`beyond` of them), rows without a
    finite score nowhere (`missing`).
    """

    low: float
    high: float
    kept: list[int]
    flagged: list[int]
    beyond: int
    missing: int

    @property
    def edges(self) -> NDArray[np.float64]:
        """Bin edges, one more than bins."""
        return np.linspace(self.low, self.high, len(self.kept) + 1)


def _limits(
    score: NDArray[np.float64], flagged: NDArray[np.bool_], components: tuple[Component, ...]
) -> tuple[float, float]:
    """Range that shows nearly all rows: a lone outlier must not squeeze the rest into one bin."""
    low, high = np.quantile(score, [0.001, 0.999])
    if flagged.any():
        # A small flagged group must stay in view even where it is under 0.1 % of the rows.
        few_low, few_high = np.quantile(score[flagged], [0.05, 0.95])
        low, high = min(low, few_low), max(high, few_high)
    for part in components:
        if np.isfinite(part.mean) and np.isfinite(part.std):
            low, high = min(low, part.mean - 3 * part.std), max(high, part.mean + 3 * part.std)
    low, high = max(low, score.min()), min(high, score.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        return float(low) - 0.5, float(high) + 0.5
    margin = 0.02 * (high - low)
    return float(low - margin), float(high + margin)


def histogram(result: CleaningResult) -> Histogram | None:
    """Bins of `result.score`, or None when no row has a finite score.

    The bin width follows Freedman and Diaconis, kept between 24 and 72 bins for the page.
    """
    finite = np.isfinite(result.score)
    score = np.asarray(result.score[finite], dtype=np.float64)
    if not score.size:
        return None
    flagged = np.asarray(result.is_flagged[finite], dtype=bool)
    low, high = _limits(score, flagged, result.components)
    quarter, three_quarters = np.quantile(score, [0.25, 0.75])
    width = 2 * (three_quarters - quarter) / np.cbrt(score.size)
    wanted = MAX_BINS if width <= 0 else (high - low) / width
    bins = int(np.clip(np.ceil(wanted), MIN_BINS, MAX_BINS))
    clipped = np.clip(score, low, high)
    kept_counts, _ = np.histogram(clipped[~flagged], bins=bins, range=(low, high))
    flagged_counts, _ = np.histogram(clipped[flagged], bins=bins, range=(low, high))
    return Histogram(
        low=low,
        high=high,
        kept=kept_counts.tolist(),
        flagged=flagged_counts.tolist(),
        beyond=int(((score < low) | (score > high)).sum()),
        missing=int((~finite).sum()),
    )
