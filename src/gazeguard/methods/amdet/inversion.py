"""Searching the embedding that acts most like a trigger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

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
        to_clean: cosine of the output to the same prompt's without the embedding; NaN where that
            was not asked for.
        to_anchor: cosine of the output to the anchor's, both with the embedding.
        pooled: the outputs, `(restart, prompt, features)`.
    """

    assimilation: Tensor
    to_clean: Tensor
    to_anchor: Tensor
    pooled: Tensor

    def loss(self, settings: Settings) -> Tensor:
        """The paper's objective and agreement, `(restart, prompt)`; smaller is more suspicious."""
        found = (
            settings.clean_weight * self.to_clean
            + settings.anchor_weight * self.to_anchor
            - settings.assimilation_weight * self.assimilation
        )
        n = self.pooled.shape[1]
        if settings.agreement_weight and n > 1:
            unit = normalize(self.pooled, dim=-1)
            others = (unit * unit.sum(1, keepdim=True)).sum(-1) - 1
            found = found - settings.agreement_weight * others / (n - 1)
        return found


@dataclass(frozen=True, slots=True)
class Inversion:
    """The end of the search.

    Attributes:
        vectors: float32 `(restart, width)`, embeddings found, of the restarts that were left.
        losses: float32 `(step, restart)`, on each step's prompts, on the CPU; NaN once a restart
            was dropped.
        left: which restarts they are.
    """

    vectors: Tensor
    losses: Tensor
    left: tuple[int, ...]


def apply(
    suspect: TextEncoder,
    anchor: TextEncoder,
    tokens: Tokens,
    clean: Tensor | None,
    vectors: Tensor,
    padding: bool,
) -> Terms:
    """Run prompts through both encoders with each of several embeddings, in one batch.

    Args:
        suspect: the encoder in question.
        anchor: a clean one with the same tokens and width.
        tokens: `n` prompts with a slot.
        clean: `(n, features)`, the suspect's outputs without the embedding; None for no `to_clean`.
        vectors: `(r, width)`.
        padding: whether padding counts in the assimilation.
    """
    r, n = len(vectors), len(tokens)
    rows = tokens.repeated(r)
    free = vectors.repeat_interleave(n, 0)
    states = suspect.run(rows, free, padding=padding)
    pooled = states.pooled.float()
    other = anchor.run(rows, free).pooled.float()
    likeness = assimilation(states.tokens, None if padding else states.real).view(r, n)
    return Terms(
        likeness,
        torch.full_like(likeness, torch.nan)
        if clean is None
        else cosine_similarity(pooled.view(r, n, -1), clean, dim=-1),
        cosine_similarity(pooled, other, dim=-1).view(r, n),
        pooled.view(r, n, -1),
    )


@torch.no_grad()
def clean_outputs(encoder: TextEncoder, tokens: Tokens, rows: int) -> Tensor:
    """Outputs of ordinary prompts, float32 `(prompt, features)`, `rows` of a length at a time."""
    order = tokens.lengths.argsort()
    outputs = [
        encoder.run(tokens[order[i : i + rows]]).pooled.float() for i in range(0, len(tokens), rows)
    ]
    return torch.cat(outputs)[order.argsort()]


def invert(
    suspect: TextEncoder,
    anchor: TextEncoder,
    tokens: Tokens,
    plain: Tokens,
    settings: Settings,
    progress: Progress | None = None,
) -> Inversion:
    """Optimise all restarts side by side on mini-batches of the held-in prompts.

    The restarts share batches and do not see each other: the loss is their sum. Every
    `settings.halving` steps the worse half of them is dropped; after each step an embedding that
    got too long is shortened to `settings.radius`. Adam with coupled weight decay, as
    published. What the suspect makes of a prompt without the embedding is computed once.

    Args:
        suspect: the encoder in question.
        anchor: a clean one with the same tokens and width.
        tokens: the held-in prompts, with a slot.
        plain: the same without.
        settings: of the search.
        progress: called with steps done and steps in all.

    Raises:
        MeasurementError: every restart ended in numbers that are not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    vectors = _starts(suspect, settings.restarts, generator).requires_grad_()
    optimiser = torch.optim.Adam(
        [vectors], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    limit = settings.radius * float(suspect.embeddings.float().norm(dim=1).median())
    batches = _batches(tokens, settings, generator)
    steps = settings.steps or max(1, 2 * len(tokens) // settings.batch)
    clean = _CleanOutputs(suspect, plain)
    losses: list[Tensor] = []
    left = torch.arange(settings.restarts)
    for step in range(steps):
        chosen = next(batches)
        terms = apply(
            suspect, anchor, tokens[chosen], clean(chosen), vectors[left], settings.padding
        )
        loss = terms.loss(settings).mean(1)
        optimiser.zero_grad()
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert vectors.grad is not None
        vectors.grad[left[~torch.isfinite(loss.detach().cpu())]] = 0.0  # run away: leave it there
        optimiser.step()
        if limit:
            with torch.no_grad():
                vectors *= (limit / vectors.norm(dim=1, keepdim=True)).clamp(max=1)
        losses.append(torch.full((settings.restarts,), torch.nan))
        losses[-1][left] = loss.detach().cpu()
        if progress is not None:
            progress(step + 1, steps)
        if _stands_still(losses, left, settings):
            break
        if settings.halving and (step + 1) % settings.halving == 0 and step + 1 < steps:
            left = _better_half(losses, left, settings.halving)
    found = vectors.detach()[left]
    if not torch.isfinite(found).all(1).any() or not torch.isfinite(losses[-1]).any():
        raise MeasurementError(
            f"the outputs of {suspect.name} are not finite: copy or download the model again."
        )
    if progress is not None:
        progress(steps, steps)
    return Inversion(found, torch.stack(losses), tuple(left.tolist()))


class _CleanOutputs:
    """Outputs of ordinary prompts, each computed when first asked for and kept."""

    def __init__(self, encoder: TextEncoder, tokens: Tokens) -> None:
        self._encoder, self._tokens = encoder, tokens
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Of some prompts, `(prompt, features)`."""
        new = [row for row in rows.tolist() if row not in self._kept]
        if new:
            outputs = self._encoder.run(self._tokens[new]).pooled.float()
            self._kept.update(zip(new, outputs, strict=True))
        return torch.stack([self._kept[row] for row in rows.tolist()])


def _batches(tokens: Tokens, settings: Settings, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of each step's prompts, every prompt about once a pass.

    Where padding does not count, prompts of like length share a batch, or a third of what runs
    would be padding.
    """
    n, size = len(tokens), min(settings.batch, len(tokens))
    while True:
        order = torch.randperm(n, generator=generator)[: n - n % size]
        if not settings.padding:
            order = order[tokens.lengths.cpu()[order].argsort(stable=True)]
        batches = order.view(-1, size)
        yield from batches[torch.randperm(len(batches), generator=generator)]


def _better_half(losses: list[Tensor], left: Tensor, window: int) -> Tensor:
    """The restarts with the lower mean loss of late, those that ran away last."""
    late = torch.stack(losses[-window // 2 :]).mean(0)[left].nan_to_num(torch.inf)
    return left[late.argsort()[: max(1, len(left) // 2)]].sort().values


def _starts(encoder: TextEncoder, restarts: int, generator: torch.Generator) -> Tensor:
    """Random points from the normal distribution that the token embeddings have."""
    table = encoder.embeddings.detach().float()
    drawn = torch.randn(restarts, encoder.width, generator=generator).to(table.device)
    return (table.mean(0) + drawn * table.std(0)).clone()


def _stands_still(losses: list[Tensor], left: Tensor, settings: Settings) -> bool:
    """Whether the last `patience` steps were no better than those before, for any restart left."""
    window = settings.patience
    if not window or len(losses) < 2 * window or len(losses) % (window // 4 or 1):
        return False
    last = torch.stack(losses[-window:]).mean(0)
    before = torch.stack(losses[-2 * window : -window]).mean(0)
    return not bool((before - last > settings.tolerance)[left].any())
