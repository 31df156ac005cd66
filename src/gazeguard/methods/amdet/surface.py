"""The loss around a found embedding, evaluated in batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.methods.amdet.inversion import apply, clean_outputs
from gazeguard.methods.amdet.settings import Settings
from gazeguard.models.encoders.encoder import TextEncoder, Tokens
from gazeguard.signals.landscape import curvatures, directions, offsets, positive_share


@dataclass(frozen=True, slots=True, eq=False)
class Surface:
    """A square of the loss with the embedding at its centre.

    Attributes:
        loss: float32 `(points, points)`; the first axis goes down the gradient.
        eigenvalues: float64 `(points - 2, points - 2, 2)` of the Hessians.
        extent: half the side, in units of the embedding.
        positive: share of positive eigenvalues; NaN when the loss is not finite somewhere.
    """

    loss: NDArray[np.float32]
    eigenvalues: NDArray[np.float64]
    extent: float
    positive: float


def surface(
    suspect: TextEncoder,
    anchor: TextEncoder,
    tokens: Tokens,
    plain: Tokens,
    vector: Tensor,
    settings: Settings,
) -> Surface:
    """Evaluate the search's loss on a grid around one embedding.

    Grid points are the restarts of the search's own batch function, so `settings.rows` sequences
    run at a time.

    Args:
        suspect: the encoder in question.
        anchor: the clean one.
        tokens: the prompts behind each point, with a slot.
        plain: the same without.
        vector: `(width,)`.
        settings: points, extent, rows and the loss's weights are used.
    """
    clean = clean_outputs(suspect, plain, settings.rows)
    centre = vector.detach().clone().requires_grad_()
    at_centre = apply(suspect, anchor, tokens, clean, centre[None], settings.padding)
    (gradient,) = torch.autograd.grad(at_centre.loss(settings).mean(), centre)
    plane = directions(gradient, settings.seed)
    places = offsets(settings.points, settings.extent).to(vector.device) @ plane
    together = max(1, settings.rows // len(tokens))
    with torch.no_grad():
        losses = torch.cat(
            [
                apply(
                    suspect,
                    anchor,
                    tokens,
                    clean,
                    vector + places[i : i + together],
                    settings.padding,
                )
                .loss(settings)
                .mean(1)
                for i in range(0, len(places), together)
            ]
        )
    grid = losses.view(settings.points, settings.points).cpu()
    found = curvatures(grid, 2 * settings.extent / (settings.points - 1))
    return Surface(grid.numpy(), found.numpy(), settings.extent, positive_share(found))
