"""Tiny model folders, built once per test session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gazeguard.lab import tiny
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.types import ImagePart, Sample, TextPart, Turn


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model of a family; shared, so read only."""
    root, built = tmp_path_factory.mktemp("tiny"), {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = tiny.build(family, root / family)
        return built[family]

    return folder


@pytest.fixture(scope="session")
def tiny_target(tiny_folder: Callable[[str], Path]) -> Callable[..., Target]:
    """A loaded tiny model, one per family and attention backend."""
    loaded: dict[tuple[str, str], Target] = {}

    def target(family: str, backend: str = "sdpa") -> Target:
        if (family, backend) not in loaded:
            fresh = load(tiny_folder(family))
            fresh.model.set_attn_implementation(backend)
            loaded[family, backend] = fresh
        return loaded[family, backend]

    return target


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sample(row: int, sizes: list[tuple[int, int]], *parts: str | int) -> Sample:
    """A one-turn sample; integers among `parts` are images, strings are words."""
    made = tuple(ImagePart(p) if isinstance(p, int) else TextPart(p) for p in parts)
    images = tuple(picture(*size, seed=10 * row + i) for i, size in enumerate(sizes))
    turns = (Turn("user", made), Turn("assistant", (TextPart("not part of the prompt"),)))
    return Sample(row, f"id-{row}", images, turns)


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Prompts of different length, image size and number of images."""
    return [
        sample(0, [(40, 60)], 0, "what is in the image?"),
        sample(1, [(64, 64)], 0, "colour?"),
        sample(2, [(30, 30), (50, 90)], 0, "and", 1, "which of the two is larger, and why?"),
    ]
