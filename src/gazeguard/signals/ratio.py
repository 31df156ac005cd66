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
    image, words = (_mass(weights, key_kind, kind) for kind in (KeyKind.IMAGE, KeyKind.PROMPT))
    ratio = image.clamp_min(MASS_FLOOR) / words.clamp_min(MASS_FLOOR)
    counted = [(key_kind == kind).any(-1) for kind in (KeyKind.IMAGE, KeyKind.PROMPT)]
    defined = (counted[0] & counted[1]).to(ratio.device)
    ratio = ratio.masked_fill(~defined[:, None, None], float("nan"))
    return ratio.log() if log else ratio


def _mass(weights: Tensor, key_kind: Tensor, kind: KeyKind) -> Tensor:
    """Summed weight on the keys of a kind; a NaN anywhere in a row stays visible."""
    chosen = (key_kind == kind).to(weights.device)[:, None, None]
    mass = torch.where(chosen, weights.float(), 0.0).sum(-1)
    return mass.masked_fill(~weights.isfinite().all(-1), float("nan"))
