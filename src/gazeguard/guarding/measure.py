"""What calibration needs to know of clean samples, batch by batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from gazeguard.errors import RowError
from gazeguard.guarding.earlier import diverging
from gazeguard.guarding.prompts import Tokens, words_of
from gazeguard.methods.cleansight.settings import Feature
from gazeguard.models.target import Target
from gazeguard.probe.attention import probe
from gazeguard.signals.ratio import visual_prompt_ratio
from gazeguard.types import KeyKind, Sample

OnSkip = Callable[[Sample, RowError], None]
Progress = Callable[[int], None]
"""Called with the number of samples seen so far."""


@dataclass(frozen=True, slots=True)
class Note:
    """What is kept of a sample besides its attention.

    Attributes:
        sample_id: of the sample.
        row: its place in the input.
        prompt: the user's words.
        tokens: their token ids.
    """

    sample_id: str
    row: int
    prompt: str
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """Attention of `n` samples, in their order.

    Attributes:
        notes: on the samples that the model could take.
        layers: layer numbers of the layer axis.
        ratio: float32 log ratios `(n, layer, head)`; NaN where they are not defined.
        strongest: float32 `(n, layer, head)`, `T` times the weight of the strongest image token.
        divergence: float64 `(n,)`, nats, from the model before its fine-tune; None where nobody
            asked.
    """

    notes: tuple[Note, ...]
    layers: tuple[int, ...]
    ratio: NDArray[np.float32]
    strongest: NDArray[np.float32]
    divergence: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.notes)

    @property
    def finite(self) -> NDArray[np.bool_]:
        """`(n,)`, whether all numbers of a sample are finite."""
        broken = ~np.isfinite(self.ratio) | ~np.isfinite(self.strongest)
        whole = np.logical_not(broken.any(axis=(1, 2)))
        return whole if self.divergence is None else whole & np.isfinite(self.divergence)

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
    earlier: bool = False,
    on_skip: OnSkip | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Look at samples with the probe.

    Args:
        target: the model.
        samples: read lazily.
        layers: layers to keep.
        batch_size: samples per forward pass.
        earlier: also compare with the model before its fine-tune; only for one with an adapter.
        on_skip: called for a sample that the model cannot take; without it such a sample raises.
        progress: called after every batch.
    """
    remaining, words = iter(samples), _Words(target)
    diverged: list[NDArray[np.float64]] = [np.zeros(0)]
    notes: list[Note] = []
    ratios: list[NDArray[np.float32]] = []
    strongest: list[NDArray[np.float32]] = []
    while batch := list(islice(remaining, batch_size)):
        for rows in probe(
            target,
            batch,
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
            kept = _kept(batch, rows.sample_id)
            notes += [words.note(sample) for sample in kept]
            if earlier:
                diverged.append(diverging(target, kept))
        if progress:
            progress(len(notes))
    empty = np.zeros((0, len(layers), 0), np.float32)
    return Measured(
        tuple(notes),
        tuple(layers),
        np.concatenate(ratios or [empty]),
        np.concatenate(strongest or [empty]),
        np.concatenate(diverged) if earlier else None,
    )


def _kept(batch: Iterable[Sample], ids: Sequence[str]) -> list[Sample]:
    """The samples of a batch that were not skipped, by their ids in the same order."""
    waiting = deque(ids)
    found = []
    for sample in batch:
        if waiting and waiting[0] == sample.sample_id:
            waiting.popleft()
            found.append(sample)
    return found


class _Words:
    """Notes on samples; the model's tokens of equal prompts are equal, and asked for once."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tokens: dict[str, Tokens] = {}

    def note(self, sample: Sample) -> Note:
        prompt = sample.prompt
        if prompt not in self._tokens:
            encoded = self._target.encode([sample])
            found = words_of(encoded.inputs["input_ids"][0], encoded.key_kind[0])
            self._tokens[prompt] = found
        return Note(sample.sample_id, sample.row, prompt, self._tokens[prompt])
