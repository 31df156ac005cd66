"""What the found embeddings do to prompts that the search never saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from gazeguard.methods.amdet.inversion import apply
from gazeguard.methods.amdet.settings import Gates, Settings
from gazeguard.models.encoders.encoder import TextEncoder, Tokens

Row = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """One embedding on `n` held-out prompts.

    Attributes:
        assimilation: `(n,)`, likeness of each prompt's token states.
        agreement: `(n,)`, cosine of each output to the first prompt's.
        anchor: `(n,)`, cosine of each output to the anchor's with the same embedding.
        unity: length of the mean unit output, in [0, 1]: 1 when all prompts give the same.
        target: `(features,)`, the mean unit output: what the embedding makes of any prompt.
    """

    assimilation: Row
    agreement: Row
    anchor: Row
    unity: float
    target: NDArray[np.float32]

    @property
    def finite(self) -> bool:
        """Whether every number can be judged."""
        return all(
            bool(np.isfinite(values).all())
            for values in (self.assimilation, self.agreement, self.anchor, self.target)
        )

    @property
    def score(self) -> float:
        """Unity less the mean cosine to the anchor, in [-1, 2]; higher is more of a backdoor.

        The one number that calibration ranks. A trigger makes all prompts alike *and* unlike what
        a clean encoder makes of the same embedding; a large random embedding only does the former.
        """
        return self.unity - float(self.anchor.mean())

    def shares(self, gates: Gates) -> tuple[float, float, float]:
        """Shares of prompts that are assimilated, that agree, and that are far from the anchor."""
        return (
            float((self.assimilation > gates.assimilation).mean()),
            float((self.agreement > gates.agreement).mean()),
            float((self.anchor < gates.anchor_cosine).mean()),
        )


@torch.no_grad()
def held_out(
    suspect: TextEncoder,
    anchor: TextEncoder,
    tokens: Tokens,
    vectors: Tensor,
    settings: Settings,
) -> list[HeldOut]:
    """Judge each embedding on the same prompts, `settings.rows` sequences at a time.

    Args:
        suspect: the encoder in question.
        anchor: the clean one.
        tokens: `n` prompts with a slot.
        vectors: `(restart, width)`.
        settings: padding and rows are used.
    """
    together = max(1, settings.rows // len(vectors))
    order = tokens.lengths.argsort()
    parts = [
        apply(suspect, anchor, tokens[order[i : i + together]], None, vectors, settings.padding)
        for i in range(0, len(tokens), together)
    ]
    back = order.argsort()
    likeness = torch.cat([part.assimilation for part in parts], 1)[:, back].double().cpu().numpy()
    to_anchor = torch.cat([part.to_anchor for part in parts], 1)[:, back].double().cpu().numpy()
    unit = normalize(torch.cat([part.pooled for part in parts], 1)[:, back], dim=-1)
    agreement = (unit @ unit[:, 0, :, None]).squeeze(-1).double().cpu().numpy()
    mean = unit.mean(1)
    return [
        HeldOut(
            likeness[i],
            agreement[i],
            to_anchor[i],
            float(mean[i].norm()),
            mean[i].float().cpu().numpy(),
        )
        for i in range(len(vectors))
    ]
