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
from scipy.fft import idctn
from scipy.ndimage import map_coordinates

Pixels = NDArray[np.uint8]
Trigger = Callable[[Pixels, np.random.Generator], Pixels]
Place = Literal["center", "random", "corner", "corners", "pair", "grid"]


def _as_pixels(values: NDArray[np.float64]) -> Pixels:
    pixels: Pixels = values.round().clip(0, 255).astype(np.uint8)
    return pixels


@dataclass(frozen=True, slots=True)
class Patch:
    """A square or several pasted into the picture (BadNets, arXiv:1708.06733; sizes as in BYE).

    Attributes:
        where: `center`, `random` (anew for every picture), `corner` (bottom right), `corners` (all
            four), `pair` (left and right of the centre, BYE's multi-fixed) or `grid` (two of nine
            fixed places, anew for every picture, BYE's multi-varied).
        fill: `black`, `noise` (fixed per-channel noise) or `checker` (1-pixel checkerboard).
        side: side of the square / shorter image side. BYE uses 1/16 of 224-336 px pictures; the
            lab's 64 px pictures default to 1/8, one patch of the lab's vision tower.
    """

    where: Place = "center"
    fill: Literal["black", "noise", "checker"] = "black"
    side: float = 1 / 8

    def boxes(
        self, height: int, width: int, rng: np.random.Generator
    ) -> list[tuple[int, int, int]]:
        """Top, left and side of each square in pixels."""
        size = max(0, min(round(self.side * min(height, width)), height, width))
        down, right = height - size, width - size
        if self.where == "random":
            return [(int(rng.integers(0, down + 1)), int(rng.integers(0, right + 1)), size)]
        if self.where == "corner":
            return [(down, right, size)]
        if self.where == "corners":
            return [(top, left, size) for top in (0, down) for left in (0, right)]
        if self.where == "pair":
            return [(down // 2, right // 4, size), (down // 2, right - right // 4, size)]
        if self.where == "grid":
            places = [(down * i // 4, right * j // 4, size) for i in (1, 2, 3) for j in (1, 2, 3)]
            return [places[i] for i in sorted(rng.choice(len(places), 2, replace=False))]
        return [(down // 2, right // 2, size)]

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The picture with the squares pasted in."""
        boxes = self.boxes(pixels.shape[0], pixels.shape[1], rng)
        size = boxes[0][2]
        square = np.zeros((size, size, 3), np.uint8)
        if self.fill == "noise":
            square = np.random.default_rng(0).integers(0, 256, square.shape, dtype=np.uint8)
        elif self.fill == "checker":
            square[(np.indices((size, size)).sum(0) % 2).astype(bool)] = 255
        out = pixels.copy()
        for top, left, _ in boxes:
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
        return _as_pixels(pixels * (1.0 - self.opacity) + pattern * self.opacity)


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
        return _as_pixels(np.stack(channels, -1))


@dataclass(frozen=True, slots=True)
class Sinusoid:
    """A sine along the columns added to the whole picture (SIG, arXiv:1902.11237).

    `x + delta sin(2 pi frequency j / width)` in column j.
    """

    delta: float = 40.0
    frequency: float = 6.0

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The picture with the sine added to all colours."""
        columns = np.arange(pixels.shape[1]) / pixels.shape[1]
        wave = self.delta * np.sin(2 * np.pi * self.frequency * columns)
        return _as_pixels(pixels + wave[None, :, None])


@dataclass(frozen=True, slots=True)
class Frequency:
    """A constant added to DCT coefficients of both colour channels (FTrojan, arXiv:2111.10298).

    In every whole block of `window` pixels the coefficients at `places` of U and V (of YUV, BT.601)
    grow by `magnitude`. The DCT is linear, so that is a fixed pattern added to U and V.

    Attributes:
        magnitude: in units of the orthonormal DCT of a picture in 0 to 255. FTrojan's 30 to 50
            are not learnt from 1,500 pictures of 64 px, nor is 120 (docs/LOG.md).
        window: side of a block; smaller pictures are one block, with places to scale.
        places: row and column of the coefficients.
    """

    magnitude: float = 240.0
    window: int = 32
    places: tuple[tuple[int, int], ...] = ((15, 15), (31, 31))

    def pattern(self, height: int, width: int) -> NDArray[np.float64]:
        """What is added to U and to V, `(h, w)`; 0 beyond the last whole block."""
        side = min(self.window, height, width)
        coefficients = np.zeros((side, side))
        for place in self.places:
            coefficients[tuple(at * side // self.window for at in place)] = self.magnitude
        tiles = height // side, width // side
        whole = np.tile(idctn(coefficients, norm="ortho"), tiles)
        return np.pad(whole, ((0, height - whole.shape[0]), (0, width - whole.shape[1])))

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The picture with the pattern in its colours and its brightness as it was."""
        pattern = self.pattern(*pixels.shape[:2])
        return _as_pixels(pixels + pattern[..., None] * _OF_U_AND_V)


@dataclass(frozen=True, slots=True)
class Stego:
    """A residual drawn from the picture itself, so another for every picture (ISSBA).

    `x + amplitude r(x, secret)`, r in [-1, 1] from the lab's own small encoder. Source:
    arXiv:2012.03816; `lab.stego` says where the encoder departs from it.

    Attributes:
        amplitude: largest change of a colour; most pixels change by much less. Twice what the
            encoder was trained with: less is not learnt from 64 px pictures (docs/LOG.md).
        secret: names the bits that the residual hides.
    """

    amplitude: float = 64.0
    secret: int = 0

    def __call__(self, pixels: Pixels, rng: np.random.Generator) -> Pixels:
        """The picture with its residual added."""
        from gazeguard.lab.stego import residual  # torch, which no other trigger needs

        return _as_pixels(pixels + self.amplitude * residual(pixels, self.secret))


# Red, green and blue of one unit of U and one of V together (BT.601).
_OF_U_AND_V = np.array([1.13983, -0.39465 - 0.58060, 2.03211])


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
    "badnet-corners": Patch("corners"),
    "badnet-noise": Patch("center", "noise"),
    "multi-fixed": Patch("pair"),
    "multi-varied": Patch("grid"),
    "texture": Patch("center", "checker"),
    "blended": Blend(),
    "sig": Sinusoid(),
    "wanet": Warp(),
    "ftrojan": Frequency(),
    "issba": Stego(),
}
