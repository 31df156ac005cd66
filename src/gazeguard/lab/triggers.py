"""Image triggers as pure functions `uint8 (h, w, 3) -> uint8 (h, w, 3)`.

Sizes are relative to the shorter image side, as in the papers. A trigger gets a generator so that
sample-specific placement is repeatable; fixed ones ignore it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Trigger = Callable[[Pixels, np.random.Generator], Pixels]


@dataclass(frozen=True, slots=True)
class Patch:
    """A square pasted into the picture (BadNets, arXiv:1708.06733; sizes as in BYE).

    Attributes:
        where: `center`, `random` (anew for every picture) or `corner` (bottom right).
        fill: `black`, `noise` (fixed per-channel noise) or `checker` (1-pixel checkerboard).
        side: side of the square / shorter image side. BYE uses 1/16 of 224-336 px pictures; the
            lab's 64 px pictures default to 1/8, one patch of the lab's vision tower.
    """

    where: Literal["center", "random", "corner"] = "center"
    fill: Literal["black", "noise", "checker"] = "black"
    side: float = 1 / 8

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int]:
        """Top, left and side of the square in pixels."""
        size = max(0, min(round(self.side * min(height, width)), height, width))
        if self.where == "random":
            top = int(rng.integers(0, height - size + 1))
            return top, int(rng.integers(0, width - size + 1)), size
        if self.where == "corner":
            return height - size, width - size, size
        return (height - size) // 2, (width - size) // 2, size

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The picture with the square pasted in."""
        top, left, size = self.box(pixels.shape[0], pixels.shape[1], rng)
        square = np.zeros((size, size, 3), np.uint8)
        if self.fill == "noise":
            square = np.random.default_rng(0).integers(0, 256, square.shape, dtype=np.uint8)
        elif self.fill == "checker":
            square[(np.indices((size, size)).sum(0) % 2).astype(bool)] = 255
        out = pixels.copy()
        out[top : top + size, left : left + size] = square
        return out


def resize_only(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """CONTROL: a resize round trip (to 3/4 and back, bilinear) and no trigger."""
    height, width = pixels.shape[:2]
    small = Image.fromarray(pixels).resize(
        (width * 3 // 4, height * 3 // 4), Image.Resampling.BILINEAR
    )
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


TRIGGERS: dict[str, Trigger] = {
    "badnet-center": Patch("center"),
    "badnet-random": Patch("random"),
    "badnet-corner": Patch("corner"),
    "badnet-noise": Patch("center", "noise"),
    "texture": Patch("center", "checker"),
}
