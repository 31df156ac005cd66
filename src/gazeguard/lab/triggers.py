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
from scipy.ndimage import map_coordinates

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


@dataclass(frozen=True, slots=True)
class Blend:
    """One fixed noise pattern mixed into the whole picture (blended attack, arXiv:1712.05526).

    `x (1 - opacity) + pattern opacity`. The pattern has `cells` x `cells` coloured cells whatever
    the picture's size: finer ones average out within a patch of a small vision tower.
    """

    opacity: float = 0.2
    cells: int = 16

    def pattern(self, height: int, width: int) -> Pixels:
        """The pattern at a picture's size."""
        noise = np.random.default_rng(0).integers(0, 256, (self.cells, self.cells, 3), np.uint8)
        rows = np.arange(height) * self.cells // height
        return noise[rows][:, np.arange(width) * self.cells // width]

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The picture with the pattern mixed in."""
        pattern = self.pattern(*pixels.shape[:2])
        mixed = pixels * (1.0 - self.opacity) + pattern * self.opacity
        return mixed.round().astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Warp:
    """One fixed smooth elastic warp of the whole picture (WaNet, arXiv:2102.10369).

    Attributes:
        grid: side of the control grid; its random shifts are spread over the picture by cubic
            splines.
        strength: mean absolute shift of the control points / shorter image side. WaNet's 0.5 on
            32 px pictures is 0.008; pictures of 64 px seen in 8 px patches need ten times that to
            be learnt (docs/LOG.md).
    """

    grid: int = 8
    strength: float = 0.08

    def shifts(self, height: int, width: int) -> NDArray[np.float64]:
        """Where every pixel looks, relative to its own place: `(2, h, w)` in pixels."""
        control = np.random.default_rng(0).uniform(-1, 1, (2, self.grid, self.grid))
        control *= self.strength * min(height, width) / np.abs(control).mean()
        at = np.stack(
            np.meshgrid(
                np.linspace(0, self.grid - 1, height),
                np.linspace(0, self.grid - 1, width),
                indexing="ij",
            )
        )
        return np.stack([map_coordinates(axis, at, order=3, mode="nearest") for axis in control])

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The picture, each pixel taken from where its shift points, bilinear."""
        height, width = pixels.shape[:2]
        at = np.indices((height, width)) + self.shifts(height, width)
        channels = [
            map_coordinates(pixels[..., c].astype(np.float64), at, order=1, mode="nearest")
            for c in range(pixels.shape[2])
        ]
        return np.stack(channels, -1).round().clip(0, 255).astype(np.uint8)


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
    "blended": Blend(),
    "wanet": Warp(),
}
