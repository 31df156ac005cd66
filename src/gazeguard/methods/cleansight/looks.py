"""How a pruning rule and the guard talk: the rule hides tokens, the guard looks and tells."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Look(NamedTuple):
    """What one run over the prompts of a batch showed.

    Attributes:
        scores: float64 `(sample,)`, distances from clean attention; may be NaN.
        evidence: `(sample, key)`, how much each key stands out, on the CPU.
    """

    scores: NDArray[np.float64]
    evidence: Tensor


Hiding = Generator[Tensor, Look, Tensor]
"""Yields tokens to hide in another look, returns those that stay hidden: bool `(sample, key)`."""
