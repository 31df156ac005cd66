"""Tsallis entropy of visual attention: one family from counting (q = 0) to the strongest token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gazeguard.errors import UsageError
from gazeguard.signals.entropy import head_visual_attention, shannon_entropy, visual_attention

_LEAST_LOG = -85.0  # below it `exp` of the opposite overflows float32; such a weight adds nothing


def tsallis_entropy(distribution: Tensor, q: float) -> Tensor:
    """`H_q = (1 - sum_t p_t^q) / (q - 1)` over the last axis; `q = 1` is Shannon's, in nats.

    Computed as `-sum_t p_t expm1((q - 1) ln p_t) / (q - 1)`, which keeps its digits for q near 1.
    Tokens without any weight do not count, also for q = 0.

    Args:
        distribution: sums to 1 over the last axis.
        q: at least 0.

    Returns:
        Without the last axis: between 0 (all weight on one token) and, for T even weights,
        `(1 - T^(1 - q)) / (q - 1)`; NaN where the distribution holds NaN.

    Raises:
        UsageError: q is negative or not finite.

    Source: METHODS 3; arXiv:2605.15711.
    """
    if not 0 <= q < float("inf"):
        raise UsageError(f"the entropy index q must be 0 or more, not {q:g}: 1 is Shannon's.")
    if q == 1:
        return shannon_entropy(distribution)
    logs = distribution.log().clamp_min(_LEAST_LOG)
    terms = -distribution * torch.expm1((q - 1) * logs) / (q - 1)
    return torch.where(distribution == 0, 0.0, terms).sum(-1)


def visual_tsallis(weights: Tensor, key_kind: Tensor, q: Sequence[float]) -> Tensor:
    """Tsallis entropies of the head-mean attention over image keys.

    Args:
        weights: `(sample, layer, head, key)` attention weights.
        key_kind: `(sample, key)` of `KeyKind`.
        q: entropy indices.

    Returns:
        float32 `(sample, layer, q)`; NaN as in `visual_entropy`.
    """
    seen = visual_attention(weights, key_kind)
    return torch.stack([tsallis_entropy(seen, index) for index in q], -1)


def head_tsallis(weights: Tensor, key_kind: Tensor, q: Sequence[float]) -> Tensor:
    """Tsallis entropies over image keys of each head on its own.

    Args:
        weights: `(sample, layer, head, key)` attention weights.
        key_kind: `(sample, key)` of `KeyKind`.
        q: entropy indices.

    Returns:
        float32 `(sample, layer, head, q)`; NaN as in `visual_entropy`.
    """
    seen = head_visual_attention(weights, key_kind)
    return torch.stack([tsallis_entropy(seen, index) for index in q], -1)
