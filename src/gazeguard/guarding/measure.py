"""What calibration needs to know of clean samples, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gazeguard.errors import RowError
from gazeguard.methods.cleansight.settings import Feature
from gazeguard.models.target import Target
from gazeguard.probe.attention import probe
from gazeguard.signals.ratio import visual_prompt_ratio
from gazeguard.types import KeyKind, Sample

OnSkip = Callable[[Sample, RowError], None]
Progress = Callable[[int], None]
"""Called with the number of samples seen so far."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Attention of `n` samples, in their order.

    Attributes:
        sample_id: of the samples that the model could take.
        layers: layer numbers of the layer axis.
        ratio: float32 log ratios `(n, layer, head)`; NaN where they are not defined.
        strongest: float32 `(n, layer, head)`, `T` times the weight of the strongest image token.
    """

    sample_id: tuple[str, ...]
    layers: tuple[int, ...]
    ratio: NDArray[np.float32]
    strongest: NDArray[np.float32]

    @property
    def finite(self) -> NDArray[np.bool_]:
        """`(n,)`, whether all numbers of a sample are finite."""
        broken = ~np.isfinite(self.ratio) | ~np.isfinite(self.strongest)
        return np.logical_not(broken.any(axis=(1, 2)))

    def features(self, layers: Sequence[int], feature: Feature) -> NDArray[np.float32]:
        """What a detector judges, `(n, layer, head)` of these layers."""
        log = self.ratio[:, [self.layers.index(layer) for layer in layers]]
        return log if feature == "log-ratio" else np.exp(log)


def measure(
    target: Target,
    samples: Iterable[Sample],
    *,
    layers: Sequence[int],
    batch_size: int,
    on_skip: OnSkip | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Look at samples with the probe.

    Args:
        target: the model.
        samples: read lazily.
        layers: layers to keep.
        batch_size: samples per forward pass.
        on_skip: called for a sample that the model cannot take; without it such a sample raises.
        progress: called after every batch.
    """
    ids: list[str] = []
    ratios: list[NDArray[np.float32]] = []
    strongest: list[NDArray[np.float32]] = []
    for rows in probe(
        target,
        samples,
        layers=layers,
        reduce_heads=False,
        batch_size=batch_size,
        on_skip=on_skip,
    ):
        image = (rows.key_kind == KeyKind.IMAGE).to(rows.weights.device)
        seen = torch.where(image[:, None, None], rows.weights, 0.0)
        share = seen.amax(-1) * image.sum(1)[:, None, None]
        ratios.append(visual_prompt_ratio(rows.weights, rows.key_kind).cpu().numpy())
        strongest.append(share.cpu().numpy())
        ids += rows.sample_id
        if progress:
            progress(len(ids))
    empty = np.zeros((0, len(layers), 0), np.float32)
    return Measured(
        tuple(ids),
        tuple(layers),
        np.concatenate(ratios or [empty]),
        np.concatenate(strongest or [empty]),
    )
