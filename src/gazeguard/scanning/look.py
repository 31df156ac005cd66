"""One model, one probe pass over the samples: its `Sight`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gazeguard.cleaning.batches import batches, out_of_memory
from gazeguard.cleaning.heap import keep_freed_memory
from gazeguard.cleaning.linear import fast_linear
from gazeguard.errors import MeasurementError, ModelError
from gazeguard.methods.entropyscan import Sight
from gazeguard.models.target import Encoded, Grid, Target, by_image
from gazeguard.probe.attention import attend
from gazeguard.signals.entropy import head_mass, visual_attention
from gazeguard.signals.ratio import visual_prompt_ratio
from gazeguard.signals.tsallis import head_tsallis, visual_tsallis
from gazeguard.types import KeyKind, Sample

_MAP_SIDE = 16  # of a mean attention map, at most
_LEAST_MASS = 1e-6  # log odds of nothing would be infinite; bfloat16 cannot tell less from it

Progress = Callable[[int, int], None]


class Samples(Protocol):
    """Samples that can be gone through, and counted before."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sample]: ...


def look(
    target: Target,
    samples: Samples,
    q: Sequence[float],
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Sight:
    """Watch a model read samples; kept are numbers per sample, layer and head, never a map.

    Args:
        target: the model.
        samples: what to show it.
        q: entropy indices.
        batch_size: samples per forward pass; None suits it to the device and the prompts.
        progress: called with the samples done and the samples in all.

    Raises:
        MeasurementError: half of the samples or more give numbers that are not finite.
        ModelError: its attention cannot be read, or a batch does not fit into memory.
    """
    names: list[str] = []
    prompts: list[str] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in measures(q)}
    maps = _Maps()
    done = broken = 0
    span = [(0, len(samples))]
    stream = batches(iter(samples), span, target.encode, batch_size, target.device)
    keep_freed_memory()
    with closing(stream), fast_linear():
        for batch in stream:
            for some, encoded in batch.parts:
                try:
                    rows = attend(target, encoded, reduce_heads=False)
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    raise ModelError(
                        f"{target.name} does not fit into memory with {len(some)} samples at once:"
                        " use --batch-size 1, --dtype bfloat16 or another --device."
                    ) from error
                keep = rows.finite.cpu()
                broken += int((~keep).sum())
                for name, measure in measures(q).items():
                    parts[name].append(measure(rows.weights, rows.key_kind)[rows.finite].cpu())
                maps.add(visual_attention(rows.weights, rows.key_kind), encoded, keep)
                hashes = _prompt_hashes(encoded)
                names += [s.sample_id for s, good in zip(some, keep, strict=True) if good]
                prompts += [h for h, good in zip(hashes, keep, strict=True) if good]
                done += len(some)
            done += len(batch.unusable)
            if progress:
                progress(done, len(samples))
    if broken * 2 >= max(1, broken + len(names)):
        raise MeasurementError(
            f"the numbers of {target.name} are not finite for {broken} of {broken + len(names)}"
            " samples, so its weights or its number format are broken: try --dtype float32 or"
            " another copy."
        )
    if not names:
        raise MeasurementError(f"{target.name} could read none of the samples: check the data.")
    arrays: dict[str, Any] = {
        name: np.asarray(torch.cat(found).numpy(), dtype=np.float32)
        for name, found in parts.items()
    }
    return Sight(
        tuple(names),
        tuple(prompts),
        target.layers,
        tuple(q),
        maps=maps.mean(len(target.layers)),
        **arrays,
    )


def measures(q: Sequence[float]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is kept of a batch's rows, by the names of `Sight`."""
    return {
        "entropy": lambda weights, kind: visual_tsallis(weights, kind, q),
        "head_entropy": lambda weights, kind: head_tsallis(weights, kind, q),
        "mass": lambda weights, kind: torch.logit(head_mass(weights, kind), _LEAST_MASS),
        "ratio": visual_prompt_ratio,
    }


def _prompt_hashes(encoded: Encoded) -> list[str]:
    """Per sample, a hash of its tokens without the padding."""
    ids, real = encoded.inputs["input_ids"], encoded.key_kind != KeyKind.PAD
    rows = (row[mask].numpy().astype(np.int64) for row, mask in zip(ids, real, strict=True))
    return [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in rows]


class _Maps:
    """Running mean of attention maps; grids of other sizes are brought to the first one's."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._side: Grid = (0, 0)
        self._count = 0

    def add(self, seen: Tensor, encoded: Encoded, keep: Tensor) -> None:
        """Add every image with a plain grid; `seen` is `(sample, layer, key)`."""
        for i, images in enumerate(encoded.images):
            every = seen[i, :, encoded.key_kind[i] == KeyKind.IMAGE].float().cpu()
            if not keep[i] or not bool(every.isfinite().all()):
                continue
            for image, one in zip(images, by_image(every, images), strict=True):
                if image.grid is None:
                    continue
                if self._sum is None:
                    self._side = (min(image.grid[0], _MAP_SIDE), min(image.grid[1], _MAP_SIDE))
                    self._sum = torch.zeros(len(one), *self._side)
                # An even look is the same number whether the image is alone in its prompt or not.
                share = one * (every.shape[1] / image.count)
                self._sum += adaptive_avg_pool2d(share, self._side)
                self._count += 1

    def mean(self, layers: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """`(layer, rows, columns)`; without rows where no sample had a plain grid."""
        if self._sum is None:
            return np.zeros((layers, 0, 0), np.float32)
        return np.asarray((self._sum / self._count).numpy(), dtype=np.float32)
