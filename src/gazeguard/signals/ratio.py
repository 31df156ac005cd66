"""How much of a head's attention the picture takes from the user's words."""

from __future__ import annotations

import torch
from torch import Tensor

from gazeguard.types import KeyKind

# Attention below this share counts as this share: one part in a million is the noise of bfloat16
# weights, and a ratio of two such numbers says nothing.
MASS_FLOOR = 1e-6


def visual_prompt_ratio(weights: Tensor, key_kind: Tensor, *, log: bool = True) -> Tensor:
    """Attention on image tokens over attention on the user's words, for every head.

    `S[l,h] = sum_{j in V} a[l,h,j] / sum_{j in P} a[l,h,j]`, or its natural logarithm. Masses below
    `MASS_FLOOR` count as `MASS_FLOOR`, so a head that looks at neither has ratio 1 (log 0) and no
    head has an infinite one.

    Args:
        weights: `(sample, layer, head, key)` attention weights.
        key_kind: `(sample, key)` of `KeyKind`; `V` is `IMAGE`, `P` is `PROMPT`.
        log: the logarithm, in which a jump by a factor is the same at any height.

    Returns:
        float32 `(sample, layer, head)`. NaN in all layers and heads of a sample without image
        tokens or without words, and in heads whose weights are not finite.

    Source: METHODS 2, step 1; arXiv:2603.12989. The logarithm is ours.
    """
    defined = ratio_defined(key_kind).to(weights.device)
    select = mass_selector(key_kind).to(weights.device)[:, None]
    return ratio_of_masses(weights.float() @ select, defined[:, None, None], log=log)


def mass_selector(key_kind: Tensor) -> Tensor:
    """float32 `(sample, key, 2)`: 1 on image tokens, and 1 on the user's words.

    `weights @ select` sums both masses; a NaN or infinity anywhere in a row stays visible.
    """
    return torch.stack([key_kind == KeyKind.IMAGE, key_kind == KeyKind.PROMPT], -1).float()


def ratio_defined(key_kind: Tensor) -> Tensor:
    """Bool `(sample,)`: it has image tokens and words."""
    return mass_selector(key_kind).any(1).all(-1)


def ratio_of_masses(masses: Tensor, defined: Tensor, *, log: bool) -> Tensor:
    """`visual_prompt_ratio` from masses `(..., 2)` of image tokens and words.

    Args:
        masses: `weights @ mass_selector(key_kind)`.
        defined: bool, broadcastable to `(...)`.
        log: as in `visual_prompt_ratio`.
    """
    image, words = masses.clamp_min(MASS_FLOOR).unbind(-1)
    ratio = (image / words).masked_fill(~defined, float("nan"))
    return ratio.log() if log else ratio
