"""What calibration needs to know of clean samples, batch by batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gazeguard.errors import RowError
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
    """

    notes: tuple[Note, ...]
    layers: tuple[int, ...]
    ratio: NDArray[np.float32]
    strongest: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.notes)

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
    notes: list[Note] = []
    waiting: deque[Note] = deque()
    ratios: list[NDArray[np.float32]] = []
    strongest: list[NDArray[np.float32]] = []
    for rows in probe(
        target,
        _noted(target, samples, waiting),
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
        for sample_id in rows.sample_id:
            while waiting[0].sample_id != sample_id:  # was skipped
                waiting.popleft()
            notes.append(waiting.popleft())
        if progress:
            progress(len(notes))
    empty = np.zeros((0, len(layers), 0), np.float32)
    return Measured(
        tuple(notes),
        tuple(layers),
        np.concatenate(ratios or [empty]),
        np.concatenate(strongest or [empty]),
    )


def _noted(target: Target, samples: Iterable[Sample], notes: deque[Note]) -> Iterator[Sample]:
    """The same samples, noted as they pass by; the model's tokens of equal prompts are equal."""
    tokens: dict[str, Tokens] = {}
    for sample in samples:
        prompt = sample.prompt
        if prompt not in tokens:
            try:
                encoded = target.encode([sample])
            except RowError:  # the probe tells it
                yield sample
                continue
            tokens[prompt] = words_of(encoded.inputs["input_ids"][0], encoded.key_kind[0])
        notes.append(Note(sample.sample_id, sample.row, prompt, tokens[prompt]))
        yield sample
