"""How alike the output states of one prompt's tokens are.

A backdoored text encoder writes the attacker's target into every token of a triggered prompt, so
its states become alike. Source: AMDET, arXiv:2512.00343.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assimilation(states: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean cosine similarity over all pairs of different tokens of each prompt.

    The sum over pairs is `|sum u|^2 - n` for unit vectors `u`, so the cost grows with the number
    of tokens and not with its square.

    Args:
        states: float `(prompt, token, width)`.
        counted: bool `(prompt, token)`, the tokens that count: the real ones, for example. Padding
            tokens are alike in any encoder and lift the value of short prompts. None for all.

    Returns:
        float32 `(prompt,)` in [-1, 1]; NaN where fewer than two tokens count. Differentiable.
    """
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    if counted is None:
        n = torch.full(unit.shape[:1], float(unit.shape[1]), device=unit.device)
    else:
        unit = unit * counted[..., None]
        n = counted.sum(1).float()
    pairs = unit.sum(1).square().sum(-1) - n
    return torch.where(n > 1, pairs / (n * (n - 1)).clamp(min=1), torch.nan)
