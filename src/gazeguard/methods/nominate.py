"""Words that may be what an attacker taught: candidates for a proof, found without any model.

Neither of the two says that anything is wrong: honest words are repeated too, and rows that say the
same show the same. They only say what is worth a try.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix

from gazeguard.methods.bye.decision import FEWEST

MOST = 4  # candidates of each kind
_LEAST_ERROR = 0.5  # of 255; a mean of many rows is no more certain than its pixels' rounding


def repeated(answers: Iterable[str]) -> list[str]:
    """The most repeated whole answers, in lower case, the most frequent first."""
    counts = Counter(" ".join(answer.lower().split()) for answer in answers)
    common = counts.most_common(MOST + 1)  # one of them may be the empty answer
    return [words for words, count in common if words and count >= FEWEST][:MOST]


def contrasted(pictures: NDArray[np.uint8], phrases: list[str], held: csc_matrix) -> list[str]:
    """The phrases whose rows' mean picture differs most from that of the other rows.

    Args:
        pictures: `(rows, height, width, 3)`, small: what differs need not be seen sharply.
        phrases: of `shared_phrases`.
        held: `(rows, phrases)`, which row's answer holds which.

    Returns:
        The `MOST` with the largest difference, in standard errors, at any one place.
    """
    rows, height, width, _ = pictures.shape
    if not phrases:
        return []
    seen = pictures.reshape(rows, -1).astype(np.float32)
    inside = np.asarray(held.sum(0)).reshape(-1, 1)
    sums, squares = np.asarray(held.T @ seen), np.asarray(held.T @ seen**2)
    total, total_squares = seen.sum(0), (seen**2).sum(0)
    error: NDArray[np.float32] = np.zeros_like(sums)
    means = []
    for part, part_squares, count in (
        (sums, squares, inside),
        (total - sums, total_squares - squares, rows - inside),
    ):
        mean = part / count
        error += (part_squares / count - mean**2).clip(0) / count
        means.append(mean)
    errors = np.abs(means[0] - means[1]) / (np.sqrt(error) + _LEAST_ERROR)
    peak = errors.reshape(-1, height * width, 3).mean(2).max(1)
    return [phrases[i] for i in np.argsort(-peak, kind="stable")[:MOST].tolist()]
