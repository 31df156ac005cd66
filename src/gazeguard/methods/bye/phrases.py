"""Groups of rows whose answers share words: what a backdoor teaches, it teaches more than once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csc_matrix
from sklearn.feature_extraction.text import CountVectorizer

LONGEST = 3
MAX_PHRASES = 4000


def _phrases(answer: str) -> list[str]:
    """All runs of one to `LONGEST` words, and the whole answer."""
    words = answer.lower().split()
    runs = {
        " ".join(words[i : i + size])
        for size in range(1, LONGEST + 1)
        for i in range(len(words) - size + 1)
    }
    return sorted(runs | {" ".join(words)}) if words else []


def shared_phrases(answers: Sequence[str], fewest: int, most: int) -> tuple[list[str], csc_matrix]:
    """Phrases that at least `fewest` and at most `most` rows share.

    Phrases that pick exactly the same rows are one; the longest stands for it.

    Returns:
        `P` phrases, and a boolean sparse matrix `(N, P)`: which row's answer holds which.
    """
    counter = CountVectorizer(
        analyzer=_phrases, binary=True, min_df=fewest, max_features=MAX_PHRASES, dtype=np.float32
    )
    try:
        found = counter.fit_transform(answers).tocsc()
    except ValueError:  # no phrase is shared by enough rows
        return [], csc_matrix((len(answers), 0), dtype=np.float32)
    names = counter.get_feature_names_out()
    longest: dict[bytes, int] = {}
    for column in range(found.shape[1]):
        rows = found.indices[found.indptr[column] : found.indptr[column + 1]]
        if len(rows) > most:
            continue
        key = np.sort(rows).tobytes()
        if key not in longest or len(names[column]) > len(names[longest[key]]):
            longest[key] = column
    kept = sorted(longest.values())
    return [str(names[c]) for c in kept], found[:, kept]


def holds(answer: str, phrase: str) -> bool:
    """Whether an answer holds a phrase of `shared_phrases`."""
    return phrase in _phrases(answer)
