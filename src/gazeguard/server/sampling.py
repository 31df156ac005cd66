"""Choosing the next token of every row of a batch, each by its own rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gazeguard.server.requests import Options

_COLDEST = 1e-5  # below, float32 has no number left to divide by


class Chooser:
    """Draws tokens for some rows; a row's draw depends on its own numbers and seed alone.

    Args:
        options: of each row.
    """

    def __init__(self, options: Sequence[Options]) -> None:
        # A share of 0 leaves the likeliest token.
        self._drawn = [i for i, row in enumerate(options) if row.temperature > 0 and row.top_p > 0]
        rows = [options[i] for i in self._drawn]
        self._temperature = torch.tensor([[row.temperature] for row in rows]).clamp_min(_COLDEST)
        self._top_p = torch.tensor([[row.top_p] for row in rows])
        # On the CPU, so that a seed means the same on every device.
        self._generators = [torch.Generator().manual_seed(row.seed) for row in rows]

    def __call__(self, logits: Tensor) -> list[int | None]:
        """One token id per row, None where the row's logits are not numbers.

        Args:
            logits: float32 `(row, token)`.
        """
        best, at = logits.max(1)
        chosen = torch.where(best.isfinite(), at, -1)
        if self._drawn:
            chosen[self._drawn] = torch.where(
                best[self._drawn].isfinite(), self._draw(logits[self._drawn]), -1
            )
        return [None if token < 0 else token for token in chosen.tolist()]

    def _draw(self, logits: Tensor) -> Tensor:
        """Draw from the likeliest tokens that hold `top_p` of the probability together."""
        top_p = self._top_p.to(logits.device)
        temperature = self._temperature.to(logits.device)
        # The largest first, so that no division overflows.
        scaled = (logits - logits.amax(1, keepdim=True)) / temperature
        share, token = scaled.softmax(1).sort(stable=True, dim=1, descending=True)
        reached = share.cumsum(1)
        reached = reached.masked_fill(reached - share >= top_p, 0.0)  # never the first token
        luck = torch.stack([torch.rand(1, generator=one) for one in self._generators])
        mark = luck.to(logits.device) * reached.amax(1, keepdim=True)
        # The first token whose sum is above the mark; rounding must not lead past the last one.
        place = (reached <= mark).logical_and(reached > 0).sum(1, keepdim=True)
        last = (reached > 0).sum(1, keepdim=True).sub(1).clamp_min(0)
        drawn: Tensor = token.gather(1, torch.minimum(place, last)).squeeze(1)
        return drawn
