"""The shape of a loss around a point: directions, grid and curvature. Pure tensor maths.

A planted backdoor is a smooth bowl, an accident of the weights ("natural backdoor") is ragged.
Source: AMDET, arXiv:2512.00343.
"""

from __future__ import annotations

import torch
from torch import Tensor

POSITIVE = 1e-6  # eigenvalues above it count as positive (the paper's)


def directions(gradient: Tensor, seed: int) -> Tensor:
    """Two orthonormal directions: down the gradient, and a random one.

    Args:
        gradient: float `(width,)` of the loss; without a finite length (a flat point) the first
            direction is random too.
        seed: of the random part.

    Returns:
        float32 `(2, width)` on the gradient's device.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, len(gradient), generator=generator).to(gradient.device)
    length = gradient.float().norm()
    if torch.isfinite(length) and length > 0:
        first = -gradient.float()
    first = first / first.norm()
    second = second - (second @ first) * first
    return torch.stack([first, second / second.norm()])


def offsets(points: int, extent: float) -> Tensor:
    """Coordinates `(points * points, 2)` of the square `[-extent, extent]^2`, row by row."""
    axis = torch.linspace(-extent, extent, points)
    return torch.cartesian_prod(axis, axis)


def curvatures(surface: Tensor, step: float) -> Tensor:
    """Eigenvalues of the 2 x 2 Hessian at every inner point, by central differences.

    Args:
        surface: float `(points, points)`, the loss on a square grid; at least 3 points a side.
        step: between two neighbours.

    Returns:
        float64 `(points - 2, points - 2, 2)`, the smaller eigenvalue first.
    """
    if min(surface.shape) < 3:
        raise ValueError(f"a surface of {tuple(surface.shape)} has no inner point")
    f = surface.double()
    centre = f[1:-1, 1:-1]
    xx = (f[2:, 1:-1] - 2 * centre + f[:-2, 1:-1]) / step**2
    yy = (f[1:-1, 2:] - 2 * centre + f[1:-1, :-2]) / step**2
    xy = (f[2:, 2:] - f[2:, :-2] - f[:-2, 2:] + f[:-2, :-2]) / (4 * step**2)
    middle = (xx + yy) / 2
    spread = torch.hypot((xx - yy) / 2, xy)
    return torch.stack([middle - spread, middle + spread], -1)


def positive_share(eigenvalues: Tensor) -> float:
    """Share of eigenvalues above `POSITIVE`; NaN when any is not finite."""
    if not torch.isfinite(eigenvalues).all():
        return float("nan")
    return float((eigenvalues > POSITIVE).double().mean())
