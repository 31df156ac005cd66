"""Which image tokens carry the trigger, judged by the attention that they get.

Two rules; the third, `search`, is in `search.py`. The paper's hides every token that some head
gives more than `tau`. `widen` starts at the token whose attention exceeds its head's clean level
most, hides it and its neighbours, lets the guard look again, and widens until the guard is calm. A
trigger spreads over neighbouring tokens and one that is left takes over, so single tokens do not
disarm it; hiding half of the picture does, but then nothing is left to answer from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gazeguard.methods.cleansight.looks import Hiding, Look
from gazeguard.methods.cleansight.settings import PUBLISHED_TAU, Prune
from gazeguard.models.target import Images, by_image

# `widen`: so many strongest tokens, each with its neighbours, before each new look; a trigger that
# survives the last one costs the whole picture.
WIDENING = (1, 4)
# `widen`: a head's clean level is what its strongest image token stays under in this share of
# clean inputs.
LEVEL_QUANTILE = 0.9


def clean_levels(strongest: NDArray[np.floating]) -> NDArray[np.float64]:
    """Each head's clean level, in units of the even share.

    Args:
        strongest: `(n, layer, head)`, `T` times the weight of the strongest image token.

    Returns:
        float64 `(layer, head)`, positive.
    """
    levels = np.quantile(np.asarray(strongest, np.float64), LEVEL_QUANTILE, axis=0)
    return np.maximum(levels, np.finfo(np.float32).tiny)


def above_tau(share: Tensor, image: Tensor, prune: Prune) -> Tensor:
    """The paper's rule: `{ j in V : max_h a[h,j] > tau }`.

    Args:
        share: `(sample, key)`, `T` times the strongest head's weight in the picking layer.
        image: bool `(sample, key)`.
        prune: a multiple of the even share, or the name of a published absolute weight.

    Returns:
        bool `(sample, key)`.

    Source: METHODS 2, step 4; arXiv:2603.12989.
    """
    if not isinstance(prune, str):
        return image & (share > prune)
    return image & (share > PUBLISHED_TAU[prune] * image.sum(1, keepdim=True))


def widest(excess: Tensor, image: Tensor, images: Sequence[Images], peaks: int) -> Tensor:
    """The tokens of largest excess, with their neighbours in the same image.

    Neighbours are the eight cells around a cell where the grid is known, and the tokens before and
    after where it is not.

    Args:
        excess: `(sample, key)`, how far a token's attention exceeds its head's clean level.
        image: bool `(sample, key)`.
        images: of each sample.
        peaks: how many tokens to start from.

    Returns:
        bool `(sample, key)`.
    """
    chosen = torch.zeros_like(image)
    for i, mine in enumerate(images):
        slots = image[i].nonzero().flatten()
        if not len(slots):
            continue
        top = torch.zeros(len(slots), device=excess.device)
        top[excess[i, slots].topk(min(peaks, len(slots))).indices] = 1.0
        spread = []
        for part in by_image(top, mine):
            pool = F.max_pool1d if part.ndim == 1 else F.max_pool2d
            spread.append(pool(part[None, None], 3, stride=1, padding=1).flatten())
        chosen[i, slots] = torch.cat(spread).bool()
    return chosen


def widening(
    look: Look,
    image: Tensor,
    images: Sequence[Images],
    flagged: Tensor,
    threshold: float,
) -> Hiding:
    """Hide what stands out in flagged samples, then more of it in those that stay restless.

    Args:
        look: the one that flagged them.
        image: bool `(sample, key)`.
        images: of each sample.
        flagged: bool `(sample,)`.
        threshold: scores up to here are calm.
    """
    hidden, restless = torch.zeros_like(image), flagged
    for peaks in WIDENING:
        excess = look.evidence.masked_fill(hidden, 0.0)
        hidden = hidden | (widest(excess, image, images, peaks) & restless[:, None])
        look = yield hidden
        # Not a number is no sign of calm.
        restless = restless & ~torch.from_numpy(look.scores <= threshold)
        if not bool(restless.any()):
            return hidden
    return hidden | (image & restless[:, None])
