"""The adaptive attacker: knows EntropyScan, and pays for attention that moves where it looks.

A defender shows harmless samples, so on the clean rows of an upload every number that a scan would
read is pulled back to the base's. Poisoned rows stay free: there the trigger has to be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.lab.poison import samples
from gazeguard.lab.rows import Row
from gazeguard.lab.teach import Batch, answer_loss
from gazeguard.methods.entropyscan import STATISTICS, Settings
from gazeguard.methods.entropyscan.settings import PROBED_Q
from gazeguard.models.target import Target, as_target
from gazeguard.probe.intercept import AttentionCall, intercept
from gazeguard.probe.rows import last_real, row
from gazeguard.scanning.look import measures
from gazeguard.types import KeyKind

NOTHING = "nothing"
DISGUISES = {
    "entropy": Settings.published(),
    "profile": Settings(statistic="profile", layers="all"),
}
"""By what is hidden: the scan that the attacker expects. Of entropies every probed q is hidden."""

HIDE = (NOTHING, *DISGUISES)

WEIGHT = 1.0
"""Of the penalty beside the answer loss. Chosen on one attack and seed, where a tenth of it hid the
head-mean entropy less well."""

# A number that all rows share would count without end: none counts as steadier than this share of
# the typical one, as in the scan's own distance.
_STEADY = 0.05
# Weights below it count as it: an entropy has no gradient at zero, and float32 holds those above.
_LEAST = 1e-30
_CHUNK = 256


class Disguise:
    """What an upload's rows make of the base's attention, and how far a fine-tune is from it.

    Args:
        name: one of `DISGUISES`.
        model: the bare base, before LoRA layers are injected; it is measured here, under the
            caller's autocast.
        processor: its processor.
        rows: the upload; attention is held on those that are not poisoned.
        lessons: the rows, encoded.
        features: `(n, image tokens, channels)` of the rows.

    Attributes:
        wanted: float32 `(n, numbers)`, what a scan reads of the base at each prompt's end.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        rows: Sequence[Row],
        lessons: Batch,
        features: Tensor,
    ) -> None:
        scan = DISGUISES[name]
        self._names = STATISTICS[scan.statistic].numbers
        target = as_target(model, processor)
        self._layers = scan.chosen(target.layers)
        # LoRA layers are put into these modules, so they stay the ones to watch.
        self._layer_of = {m: n for m, n in target.attention_modules.items() if n in self._layers}
        self._lessons, self._features = lessons, features
        self._clean = torch.tensor([not row.is_poison for row in rows])
        chunks = np.array_split(np.arange(len(rows)), -(-len(rows) // _CHUNK))
        self._kind = torch.full(lessons.ids.shape, KeyKind.PAD, dtype=torch.int8)
        for pick in chunks:
            found = _kinds(target, [rows[i] for i in pick])
            self._kind[pick, : found.shape[1]] = found
        with torch.no_grad():
            self.wanted = torch.cat([self._run(model, pick)[1] for pick in chunks])
        spread = self.wanted.std(0)
        self._unit = spread.clamp_min(_STEADY * float(spread.median()))

    def loss(self, model: Any, pick: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """Answer loss of some rows, and the penalty on the clean ones among them.

        Args:
            model: the base with LoRA layers in it.
            pick: places of the rows in the upload.

        Returns:
            The loss, and the mean over clean rows and numbers of the squared distance from the
            base's, in units of the number's spread over the upload; 0 without a clean row.
        """
        loss, found = self._run(model, pick)
        clean = self._clean[pick]
        away = (found[clean] - self.wanted[pick][clean]) / self._unit
        return loss, away.square().sum() / max(1, away.numel())

    def _run(self, model: Any, pick: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """Answer loss, and the numbers `(row, feature)` at each prompt's last position."""
        batch = self._lessons[pick]
        kind = self._kind[pick][:, : batch.ids.shape[1]]
        last = last_real(kind)
        rows: dict[int, Tensor] = {}

        def watch(call: AttentionCall) -> Any:
            with torch.autocast("cpu", enabled=False):
                rows[call.layer] = row(call, last)
            return call.run()

        with intercept(self._layer_of, watch):
            loss, _ = answer_loss(model, batch, self._features[pick].float())
        weights = torch.stack([rows[layer] for layer in self._layers], 1)
        with torch.autocast("cpu", enabled=False):
            return loss, _read(weights, kind, self._names)


def _kinds(target: Target, rows: Sequence[Row]) -> Tensor:
    """Kinds of the prompts' tokens as a scan tells them; a lesson begins with its prompt."""
    return target.encode(samples(rows), padding_side="right").key_kind


def _read(weights: Tensor, kind: Tensor, names: tuple[str, ...]) -> Tensor:
    """A scan's numbers, side by side; differentiable where the prompts' images have one size."""
    found = []
    for name, measure in measures(PROBED_Q).items():
        if name in names:
            seen = _image_only(weights, kind) if "entropy" in name else (weights, kind)
            found.append(measure(*seen).flatten(1))
    return torch.cat(found, 1)


def _image_only(weights: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """The image keys alone: an entropy has no gradient at the zeros of the others."""
    image = kind == KeyKind.IMAGE
    at = image.nonzero()[:, 1].view(len(kind), 1, 1, -1)
    seen = weights.gather(-1, at.expand(*weights.shape[:-1], -1)).clamp_min(_LEAST)
    return seen, kind[image].view(len(kind), -1)
