"""Searching the embedding that acts most like a trigger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gazeguard.errors import MeasurementError
from gazeguard.methods.amdet.settings import Settings
from gazeguard.models.encoders.encoder import TextEncoder, Tokens
from gazeguard.signals.assimilation import assimilation

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Terms:
    """What an embedding does to prompts; each `(restart, prompt)`, float32, on the device.

    Attributes:
        assimilation: likeness of the tokens' states.
        to_clean: cosine of the output to the same prompt's without the embedding.
        to_anchor: cosine of the output to the anchor's, both with the embedding.
        pooled: the outputs, `(restart, prompt, features)`.
    """

    assimilation: Tensor
    to_clean: Tensor
    to_anchor: Tensor
    pooled: Tensor

    def loss(self, settings: Settings) -> Tensor:
        """The objective of METHODS step 2, `(restart, prompt)`; smaller is more of a trigger."""
        return (
            -self.assimilation
            + settings.clean_weight * self.to_clean
            + settings.anchor_weight * self.to_anchor
        )


@dataclass(frozen=True, slots=True)
class Inversion:
    """The end of the search.

    Attributes:
        vectors: float32 `(restart, width)`, embeddings found.
        losses: float32 `(step, restart)`, on each step's prompts, on the CPU.
    """

    vectors: Tensor
    losses: Tensor


def apply(
    suspect: TextEncoder,
    anchor: TextEncoder,
    tokens: Tokens,
    clean: Tensor,
    vectors: Tensor,
    padding: bool,
) -> Terms:
    """Run prompts through both encoders with each of several embeddings, in one batch.

    Args:
        suspect: the encoder in question.
        anchor: a clean one with the same tokens and width.
        tokens: `n` prompts with a slot.
        clean: `(n, features)`, the suspect's outputs without the embedding.
        vectors: `(r, width)`.
        padding: whether padding counts in the assimilation.
    """
    r, n = len(vectors), len(tokens)
    rows = tokens.repeated(r)
    free = vectors.repeat_interleave(n, 0)
    states = suspect.run(rows, free, padding=padding)
    pooled = states.pooled.float()
    other = anchor.run(rows, free).pooled.float()
    return Terms(
        assimilation(states.tokens, None if padding else states.real).view(r, n),
        cosine_similarity(pooled.view(r, n, -1), clean, dim=-1),
        cosine_similarity(pooled, other, dim=-1).view(r, n),
        pooled.view(r, n, -1),
    )


@torch.no_grad()
def clean_outputs(encoder: TextEncoder, tokens: Tokens, rows: int) -> Tensor:
    """Outputs of ordinary prompts, float32 `(prompt, features)`, `rows` at a time."""
    return torch.cat(
        [encoder.run(tokens[i : i + rows]).pooled.float() for i in range(0, len(tokens), rows)]
    )


def invert(
    suspect: TextEncoder,
    anchor: TextEncoder,
    tokens: Tokens,
    clean: Tensor,
    settings: Settings,
    progress: Progress | None = None,
) -> Inversion:
    """Optimise all restarts side by side on mini-batches of the held-in prompts.

    The restarts share batches and do not see each other: the loss is their sum. Adam with coupled
    weight decay, as published.

    Raises:
        MeasurementError: every restart ended in numbers that are not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    vectors = _starts(suspect, settings.restarts, generator).requires_grad_()
    optimiser = torch.optim.Adam(
        [vectors], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    batch = min(settings.batch, len(tokens))
    steps = settings.steps or max(1, 2 * len(tokens) // batch)
    losses: list[Tensor] = []
    order: list[int] = []
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(tokens), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        terms = apply(suspect, anchor, tokens[chosen], clean[chosen], vectors, settings.padding)
        loss = terms.loss(settings).mean(1)
        optimiser.zero_grad()
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert vectors.grad is not None
        vectors.grad[~torch.isfinite(loss.detach())] = 0.0  # run away: leave it there
        optimiser.step()
        losses.append(loss.detach().cpu())
        if progress is not None:
            progress(step + 1, steps)
        if _stands_still(losses, settings):
            break
    found = vectors.detach()
    if not torch.isfinite(found).all(1).any() or not torch.isfinite(losses[-1]).any():
        raise MeasurementError(
            f"the outputs of {suspect.name} are not finite: copy or download the model again."
        )
    if progress is not None:
        progress(steps, steps)
    return Inversion(found, torch.stack(losses))


def _starts(encoder: TextEncoder, restarts: int, generator: torch.Generator) -> Tensor:
    """Random points from the normal distribution that the token embeddings have."""
    table = encoder.embeddings.detach().float()
    drawn = torch.randn(restarts, encoder.width, generator=generator).to(table.device)
    return (table.mean(0) + drawn * table.std(0)).clone()


def _stands_still(losses: list[Tensor], settings: Settings) -> bool:
    """Whether the last `patience` steps were no better than those before, for every restart."""
    window = settings.patience
    if not window or len(losses) < 2 * window or len(losses) % (window // 4 or 1):
        return False
    last = torch.stack(losses[-window:]).mean(0)
    before = torch.stack(losses[-2 * window : -window]).mean(0)
    return not bool((before - last > settings.tolerance).any())
