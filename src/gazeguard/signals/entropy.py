"""How a prompt's end spreads its attention over the image: entropy and mass per layer."""

from __future__ import annotations

import torch
from torch import Tensor

from gazeguard.types import KeyKind


def visual_attention(weights: Tensor, key_kind: Tensor) -> Tensor:
    """Head-averaged attention over image keys, renormalised to sum 1 (`A[l, t]`).

    Args:
        weights: `(sample, layer, head, key)` attention weights.
        key_kind: `(sample, key)` of `KeyKind`.

    Returns:
        float32 `(sample, layer, key)`, 0 outside the image keys, NaN where a layer gives the
        image no weight at all or a weight is not finite.

    Source: METHODS 1, step 1; Eq. 3-4 of arXiv:2505.16916.
    """
    return _normalised(weights.float().mean(2), key_kind)


def head_visual_attention(weights: Tensor, key_kind: Tensor) -> Tensor:
    """Each head's attention over image keys, renormalised to sum 1.

    Args:
        weights: `(sample, layer, head, key)` attention weights.
        key_kind: `(sample, key)` of `KeyKind`.

    Returns:
        float32 `(sample, layer, head, key)`; 0 and NaN as in `visual_attention`.
    """
    return _normalised(weights.float(), key_kind)


def visual_entropy(weights: Tensor, key_kind: Tensor) -> Tensor:
    """Shannon entropy of `visual_attention`, in nats.

    Between 0 (all weight on one image token) and `ln T` for `T` image tokens.

    Args:
        weights: `(sample, layer, head, key)` attention weights.
        key_kind: `(sample, key)` of `KeyKind`.

    Returns:
        float32 `(sample, layer)`; NaN where the visual mass is zero or a weight is not finite.

    Source: METHODS 1, step 2; arXiv:2505.16916.
    """
    return shannon_entropy(visual_attention(weights, key_kind))


def head_entropy(weights: Tensor, key_kind: Tensor) -> Tensor:
    """Shannon entropy over image keys of each head on its own, in nats.

    Args:
        weights: `(sample, layer, head, key)` attention weights.
        key_kind: `(sample, key)` of `KeyKind`.

    Returns:
        float32 `(sample, layer, head)`; NaN as in `visual_entropy`.
    """
    return shannon_entropy(head_visual_attention(weights, key_kind))


def visual_mass(weights: Tensor, key_kind: Tensor) -> Tensor:
    """Share of the head-averaged attention that lies on image keys, in [0, 1].

    Args:
        weights: `(sample, layer, head, key)` attention weights.
        key_kind: `(sample, key)` of `KeyKind`.

    Returns:
        float32 `(sample, layer)`; NaN where a weight is not finite.
    """
    return _on_image(weights.float().mean(2), key_kind).sum(-1)


def head_mass(weights: Tensor, key_kind: Tensor) -> Tensor:
    """Share of each head's attention that lies on image keys, in [0, 1].

    Args:
        weights: `(sample, layer, head, key)` attention weights.
        key_kind: `(sample, key)` of `KeyKind`.

    Returns:
        float32 `(sample, layer, head)`; NaN where a weight is not finite.
    """
    return _on_image(weights.float(), key_kind).sum(-1)


def _on_image(weights: Tensor, key_kind: Tensor) -> Tensor:
    """Zero the other keys, for weights `(sample, ..., key)`; a NaN in a row stays visible."""
    image = (key_kind == KeyKind.IMAGE).to(weights.device)
    image = image.view(len(image), *[1] * (weights.ndim - 2), -1)
    broken = ~weights.isfinite().all(-1, keepdim=True)
    return torch.where(image, weights, 0.0).masked_fill(broken, float("nan"))


def _normalised(weights: Tensor, key_kind: Tensor) -> Tensor:
    seen = _on_image(weights, key_kind)
    return seen / seen.sum(-1, keepdim=True)  # 0 / 0 is NaN: no mass, no distribution


def shannon_entropy(distribution: Tensor) -> Tensor:
    """Over the last axis, in nats."""
    terms: Tensor = torch.special.entr(distribution)
    return terms.sum(-1)
