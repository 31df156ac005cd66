"""Choosing detection layers without ever seeing an attack.

Where a trigger shows differs from model to model and from trigger to trigger, so a choice made on
one attack would flatter itself on that attack. What can be known beforehand is which layers read
the picture and not its noise: where the ratio differs much between clean pictures and little
between a picture and a harmlessly changed copy. A trigger is content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from gazeguard.types import Sample

WINDOW = 3  # consecutive layers, as many as the paper's


def _noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float64)
    return Image.fromarray((pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8))


def _light(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.8, 1.2)))


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 100))


CHANGES: tuple[Callable[[Image.Image, np.random.Generator], Image.Image], ...] = (
    _noise,
    _light,
    _blur,
)
"""Harmless changes: sensor noise, exposure, focus. None of them pastes anything in."""


def changed(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Every sample once under each harmless change; RGB images, ids marked with the change."""
    rng = np.random.default_rng([seed, 23])
    return [
        replace(
            sample,
            sample_id=f"{sample.sample_id}{change.__name__}",
            images=tuple(change(image, rng) for image in sample.images),
        )
        for change in CHANGES
        for sample in samples
    ]


def most_telling(
    clean: NDArray[np.floating], copies: NDArray[np.floating], layers: Sequence[int]
) -> tuple[int, ...]:
    """The run of `WINDOW` consecutive layers with the most content for their noise.

    A head's content is the standard deviation of its log ratio over clean inputs, its noise the
    root mean square difference between an input and its changed copies; a layer counts by the
    median head's quotient.

    Args:
        clean: finite log ratios `(n, layer, head)`.
        copies: those of the changed copies, `(change, n, layer, head)`.
        layers: layer numbers of the layer axis, ascending.

    Returns:
        Layer numbers; all of them when the model has no more than `WINDOW`.
    """
    x = np.asarray(clean, np.float64)
    noise = np.sqrt(((np.asarray(copies, np.float64) - x) ** 2).mean((0, 1)))
    telling = np.median(x.std(0) / np.maximum(noise, np.finfo(np.float32).eps), axis=1)
    width = min(WINDOW, len(layers))
    runs = np.lib.stride_tricks.sliding_window_view(telling, width).mean(1)
    start = int(runs.argmax())
    return tuple(layers[start : start + width])
