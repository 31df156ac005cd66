"""What one run over some prompts shows: attention of their last positions, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.probe.intercept import AttentionCall
from gazeguard.probe.rows import last_real, row
from gazeguard.signals.ratio import mass_selector, ratio_defined, ratio_of_masses
from gazeguard.types import KeyKind

if TYPE_CHECKING:
    from gazeguard.guarding.guard import Guard


class Reading:
    """Reads watched layers as they are computed; little is done per layer, the rest at the end.

    Args:
        guard: says which layers are watched, and judges.
        kind: int8 `(sample, position)` of `KeyKind`.
    """

    def __init__(self, guard: Guard, kind: Tensor) -> None:
        self._guard, self._kind = guard, kind
        self._image = kind == KeyKind.IMAGE
        self._last = last_real(kind)
        self._at_end = bool((self._last == kind.shape[1] - 1).all())
        self._here: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._masses: dict[int, Tensor] = {}  # layer -> (sample, head, 2)
        self._rows: dict[int, Tensor] = {}  # layer -> (sample, head, key), where tokens are picked
        self._seen: set[int] = set()

    @property
    def unseen(self) -> frozenset[int]:
        """Watched layers that have not been computed in this run."""
        return self._guard.plan.watched - self._seen

    def clear(self) -> None:
        """Forget a run."""
        self._masses.clear()
        self._rows.clear()
        self._seen.clear()

    def read(self, call: AttentionCall, hidden: Tensor | None) -> bool:
        """Take in a layer's attention call; whether it was the last one that is watched.

        Args:
            call: of a run over the whole prompts; more rows than samples are copies of them.
            hidden: bool `(sample, position)`, tokens that this run hides.
        """
        plan, layer = self._guard.plan, call.layer
        if layer not in self.unseen:
            return False
        samples, length = self._kind.shape
        copies = call.query.shape[0] // samples  # beams and returned sequences share a prompt
        device = call.query.device
        if device not in self._here:
            self._here[device] = (self._last.to(device), mass_selector(self._kind).to(device))
        last, select = self._here[device]
        if copies > 1:
            last = last.repeat_interleave(copies)
        weights = row(call, last, length, at_end=self._at_end)[::copies, :, :length]
        if hidden is not None and layer >= plan.hide_from:
            weights = _without(weights, hidden.to(device)[:, None])
        if layer in plan.layers:
            self._masses[layer] = weights @ select
        if layer in plan.pick:
            self._rows[layer] = weights
        self._seen.add(layer)
        return not self.unseen

    def scores(self, hidden: Tensor | None) -> NDArray[np.float64]:
        """Each sample's distance from clean attention; `hidden` as in `read`."""
        layers, log = self._guard.plan.layers, self._guard.setting.feature == "log-ratio"
        masses = _together([self._masses[layer] for layer in layers])
        ratio = ratio_of_masses(masses, ratio_defined(self._kind)[:, None, None], log=log)
        if hidden is not None:
            # A picture with tokens missing gets less attention for that alone.
            left = (self._image & ~hidden).sum(1).clamp_min(1)
            gain = (self._image.sum(1).clamp_min(1) / left)[:, None, None]
            missing = torch.tensor([layer >= self._guard.plan.hide_from for layer in layers])
            gain = torch.where(missing[:, None], gain, 1.0)
            ratio = ratio + gain.log() if log else ratio * gain
        return self._guard.detector.score(ratio.double().numpy())

    def evidence(self) -> Tensor:
        """How much each key stands out in some picking layer, `(sample, key)`, on the CPU."""
        found = [
            self._guard.evidence(layer, rows, self._image.to(rows.device)).cpu()
            for layer, rows in self._rows.items()
        ]
        return torch.stack(found).amax(0)


def _together(parts: list[Tensor]) -> Tensor:
    """Stacked along axis 1 on the CPU; one transfer where all are on one device."""
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    return torch.stack(parts, 1).cpu()


def _without(weights: Tensor, hidden: Tensor) -> Tensor:
    """Weights `(sample, head, key)` as softmax gives them when some keys are hidden."""
    lost = weights.masked_fill(~hidden, 0.0).sum(-1, keepdim=True)
    left = (1.0 - lost).clamp_min(torch.finfo(weights.dtype).eps)
    return weights.masked_fill(hidden, 0.0) / left
