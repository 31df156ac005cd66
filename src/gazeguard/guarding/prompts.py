"""Is a prompt like those of the calibration? What a guard learnt says nothing about others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gazeguard.calibrate import conformal_threshold
from gazeguard.types import KeyKind

Tokens = tuple[int, ...]

MOST = 200  # prompts that are kept; a request is compared with each
UNLIKE = "the prompt is unlike those of the calibration"


@dataclass(frozen=True)
class Prompts:
    """Prompts of the fit half, and how unlike the nearest of them a prompt may be.

    Two prompts are as unlike as the share of their tokens, counted as often as they occur, that
    they do not have in common: 0 for the same words in any order, 1 for no common word.

    Attributes:
        known: ascending token ids of the user's words, one entry per different prompt.
        limit: the conformal threshold of the threshold half at the guard's alpha.
    """

    known: tuple[Tokens, ...]
    limit: float

    @classmethod
    def fit(cls, fit: Iterable[Tokens], rest: Iterable[Tokens], alpha: float, seed: int) -> Prompts:
        """Learn from the prompts of both halves; a clean one is unlike with at most `alpha`."""
        different = sorted({tuple(sorted(tokens)) for tokens in fit})
        chosen = np.random.default_rng([seed, 31]).permutation(len(different))[:MOST]
        known = tuple(different[i] for i in sorted(chosen))
        apart = cls(known, 1.0)
        return cls(known, conformal_threshold([apart.distance(tokens) for tokens in rest], alpha))

    def distance(self, tokens: Sequence[int]) -> float:
        """How unlike the nearest known prompt it is, in [0, 1]."""
        mine = Counter(tokens)
        column = {token: i for i, token in enumerate(mine)}
        held = np.array([*mine.values()], dtype=np.float64)
        theirs, sizes = np.zeros((len(self.known), len(mine))), np.zeros(len(self.known))
        for row, known in enumerate(self.known):
            sizes[row] = len(known)
            for token in known:
                if token in column:
                    theirs[row, column[token]] += 1
        common = np.minimum(theirs, held).sum(1)
        return float((1.0 - common / np.maximum(sizes + held.sum() - common, 1.0)).min())

    def why_unlike(self, tokens: Sequence[int]) -> str | None:
        """What is to be said of a prompt that is too unlike; None for one that is not."""
        distance = self.distance(tokens)
        if distance <= self.limit + 1e-9:
            return None
        return f"{UNLIKE} ({distance:.0%} of its tokens against at most {self.limit:.0%})"

    def as_json(self) -> dict[str, Any]:
        """JSON types."""
        return {"limit": self.limit, "known": [list(tokens) for tokens in self.known]}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Prompts:
        """What `as_json` came from."""
        known = tuple(tuple(int(token) for token in tokens) for tokens in content["known"])
        return cls(known, float(content["limit"]))


def words_of(ids: Tensor, kind: Tensor) -> Tokens:
    """Token ids of the user's words in one prompt.

    Args:
        ids: int64 `(position,)`.
        kind: int8 `(position,)` of `KeyKind`.
    """
    return tuple(ids[kind == KeyKind.PROMPT].tolist())
