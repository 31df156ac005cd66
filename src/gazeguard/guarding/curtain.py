"""Hides prompt tokens from attention calls, in the prompt's pass and in every later step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gazeguard.probe.hide import run_hiding
from gazeguard.probe.intercept import AttentionCall


class Curtain:
    """What is hidden from which sample.

    Args:
        hidden: bool `(sample, position)` of the prompts, on the CPU.
        first: layer from which on it is hidden.
    """

    def __init__(self, hidden: Tensor, first: int) -> None:
        self.hidden, self._first = hidden, first
        self._windows: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def run(self, call: AttentionCall, positions: int) -> Any:
        """Run an attention call without the hidden keys.

        Args:
            call: its batch has every sample's copies next to each other.
            positions: of the sequence so far, cached ones included.
        """
        window = None if call.layer < self._first else self._window(call, positions)
        return call.run() if window is None else run_hiding(call, *window)

    def _window(self, call: AttentionCall, positions: int) -> tuple[Tensor, Tensor] | None:
        """Batch places of samples with hidden tokens, and which of the call's keys those are."""
        batch, keys = call.key.shape[0], call.key.shape[2]
        # A sliding cache has dropped its oldest keys; a static one has slots beyond the newest.
        first = max(0, positions - keys)
        if first >= self.hidden.shape[1]:
            return None
        name = (batch, keys, first, call.key.device)
        if name not in self._windows:
            samples = self.hidden.any(1).nonzero().flatten()
            copies = batch // len(self.hidden)
            places = samples[:, None] * copies + torch.arange(copies)
            seen = self.hidden[samples][:, first : first + keys]
            window = torch.zeros(len(samples), keys, dtype=torch.bool)
            window[:, : seen.shape[1]] = seen
            self._windows.clear()  # of an earlier step
            self._windows[name] = (
                places.flatten().to(call.key.device),
                window.repeat_interleave(copies, 0).to(call.key.device),
            )
        return self._windows[name]
