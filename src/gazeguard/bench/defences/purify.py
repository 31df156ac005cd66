"""Baselines that change the picture of every request and answer again; none of them judges.

A trigger in the words passes all of them untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.decomposition import PCA
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor
from torch.nn import functional as F

from gazeguard.bench.defences.registry import defence
from gazeguard.bench.defences.saliency import first_picture, with_picture
from gazeguard.bench.subject import Responses, Traffic
from gazeguard.lab.triggers import Pixels
from gazeguard.types import Sample

Change = Callable[[Pixels, np.random.Generator], Pixels]

# Of the shorter side, and of the range of values: the strongest tried that left most of the lab's
# clean captions right. The share of padding is the published one (4 of 32 pixels).
BLUR, NOISE, SHRINK = 1 / 80, 0.05, 1 / 8
PATCH, PATCHES_PER_PICTURE = 8, 100


def changed(requests: Sequence[Sample], change: Change, seed: int) -> list[Sample]:
    """Requests with their first picture changed; each has a generator of its own."""
    return [
        with_picture(request, change(first_picture(request), np.random.default_rng([seed, 29, i])))
        for i, request in enumerate(requests)
    ]


def blurred(pixels: Pixels, width: float) -> Pixels:
    """Gaussian blur.

    Args:
        pixels: uint8 `(h, w, 3)`.
        width: standard deviation / shorter side; 0 changes nothing.
    """
    radius = width * min(pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def shrunk(pixels: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    """The picture made smaller, at a random place on black (ShrinkPad, arXiv:2104.02361).

    Args:
        pixels: uint8 `(h, w, 3)`.
        share: of each side that becomes padding; 0 changes nothing.
        rng: draws the place.
    """
    height, width = pixels.shape[:2]
    rows, columns = (max(1, round(side * (1 - share))) for side in (height, width))
    small = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR)
    top, left = int(rng.integers(0, height - rows + 1)), int(rng.integers(0, width - columns + 1))
    out = np.zeros_like(pixels)
    out[top : top + rows, left : left + columns] = np.asarray(small)
    return out


class PatchRestorer:
    """Removes noise of a known strength with what patches of clean pictures look like.

    Each patch of a noisy picture is written in the principal components of clean patches, and each
    component shrunk to the share of its variance that is signal (Wiener's filter); overlapping
    patches are averaged.

    Attributes:
        mean, axes, variance: of clean patches, `(d,)`, `(k, d)`, `(k,)`, values in 0 to 255.
        side: of a patch in pixels.
    """

    def __init__(self, pictures: Sequence[Pixels], seed: int) -> None:
        self.side = min(PATCH, *(min(pixels.shape[:2]) for pixels in pictures))
        size = (self.side, self.side)
        patches = [
            extract_patches_2d(pixels, size, max_patches=PATCHES_PER_PICTURE, random_state=seed + i)
            for i, pixels in enumerate(pictures)
        ]
        # As `unfold` orders a patch: colour, row, column.
        flat = np.concatenate(patches).transpose(0, 3, 1, 2).reshape(-1, 3 * self.side**2)
        fitted = PCA(svd_solver="full").fit(flat.astype(np.float64))
        self.mean, self.axes = fitted.mean_, fitted.components_
        self.variance: NDArray[np.float64] = fitted.explained_variance_

    def restore(self, noisy: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
        """A picture with less noise.

        Args:
            noisy: `(h, w, 3)`, at least a patch wide and high.
            sigma: standard deviation of its noise, above 0.
        """
        kept = self.variance / (self.variance + sigma**2)
        axes, mean = torch.from_numpy(self.axes), torch.from_numpy(self.mean)
        picture = torch.from_numpy(noisy).movedim(-1, 0)[None]
        patches = F.unfold(picture, self.side)[0].T - mean
        restored = (patches @ axes.T * torch.from_numpy(kept)) @ axes + mean
        return np.asarray(self._put_together(restored, noisy.shape[:2]).movedim(0, -1).numpy())

    def _put_together(self, patches: Tensor, size: tuple[int, ...]) -> Tensor:
        total = F.fold(patches.T[None], size, self.side)
        count = F.fold(torch.ones_like(patches.T[None]), size, self.side)
        return (total / count)[0]


def denoised(
    pixels: Pixels, restorer: PatchRestorer, strength: float, rng: np.random.Generator
) -> Pixels:
    """Gaussian noise put on a picture and taken off again.

    Args:
        pixels: uint8 `(h, w, 3)`.
        restorer: takes it off.
        strength: standard deviation of the noise / range of values; 0 changes nothing.
        rng: draws the noise.
    """
    if not strength:
        return pixels
    sigma = 255 * strength
    found = restorer.restore(pixels + rng.normal(0, sigma, pixels.shape), sigma)
    return found.round().clip(0, 255).astype(np.uint8)


def _answered(traffic: Traffic, change: Change) -> Responses:
    return Responses([*traffic.answers(changed(traffic.asked, change, traffic.seed))])


@defence("blur", "input")
def blur(traffic: Traffic) -> Responses:
    """Gaussian blur of every picture."""
    return _answered(traffic, lambda pixels, rng: blurred(pixels, BLUR))


@defence("spatial", "input")
def spatial(traffic: Traffic) -> Responses:
    """Every picture mirrored, shrunk and padded at random, as the paper's ST does.

    Left and right change places, so answers that name a side become wrong.
    """
    return _answered(traffic, lambda pixels, rng: shrunk(pixels[:, ::-1], SHRINK, rng))


@defence("denoise", "input")
def denoise(traffic: Traffic) -> Responses:
    """Noise on every picture, removed by patch PCA; stands in for ZIP and SampDetox, is neither.

    Those restore with a diffusion model; this one knows no more than the patches of the known
    requests' pictures.
    """
    restorer = PatchRestorer([first_picture(each) for each in traffic.known], traffic.seed)
    return _answered(traffic, lambda pixels, rng: denoised(pixels, restorer, NOISE, rng))
