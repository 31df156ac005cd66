"""AMDET as its public implementation works: one embedding, every prompt at full length, batch 1.

Written by us from what is known of it, on the same encoder objects, so that only the way of working
differs. Where the description leaves something open the cheaper reading is taken: each held-out
prompt and each landscape point goes once through either encoder, and what the landscape's prompt
gives without the embedding is computed once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from gazeguard.lab.text.train import clean_drift
from gazeguard.methods.amdet.decision import decide, gates_of
from gazeguard.methods.amdet.heldout import HeldOut
from gazeguard.methods.amdet.inversion import Terms
from gazeguard.methods.amdet.settings import Settings
from gazeguard.models.encoders.encoder import TextEncoder, Tokens
from gazeguard.signals.assimilation import assimilation
from gazeguard.signals.landscape import curvatures, directions, offsets, positive_share
from gazeguard.types import Verdict


@dataclass(frozen=True, slots=True)
class PublicWay:
    """One suspect beside its anchor, with prompts that have a slot and the same without.

    Attributes:
        suspect, anchor: the encoders.
        slotted, plain: `n` prompts, at full length.
        settings: `Settings.published()`, perhaps with fewer steps.
    """

    suspect: TextEncoder
    anchor: TextEncoder
    slotted: Tokens
    plain: Tokens
    settings: Settings

    def search(self, rows: Sequence[int], start: Tensor, steps: int) -> Tensor:
        """The embedding `(width,)` after `steps` mini-batches of the prompts named by `rows`.

        What the suspect makes of the batch without the embedding is computed at every step.
        """
        settings = self.settings
        vector = start.clone().requires_grad_()
        optimiser = torch.optim.Adam(
            [vector], lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        generator = torch.Generator().manual_seed(settings.seed)
        order: list[int] = []
        for _ in range(steps):
            if len(order) < min(settings.batch, len(rows)):
                order = torch.randperm(len(rows), generator=generator).tolist()
            chosen = [rows[i] for i in order[: settings.batch]]
            order = order[settings.batch :]
            loss = self._terms(chosen, vector, self._clean(chosen)).loss(settings).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return vector.detach()

    @torch.no_grad()
    def judge(self, rows: Sequence[int], vector: Tensor) -> HeldOut:
        """The embedding on held-out prompts, one at a time."""
        each = [self._terms([row], vector) for row in rows]
        unit = normalize(torch.cat([terms.pooled[0] for terms in each]), dim=-1)
        mean = unit.mean(0)
        return HeldOut(
            torch.cat([terms.assimilation[0] for terms in each]).double().numpy(),
            (unit @ unit[0]).double().numpy(),
            torch.cat([terms.to_anchor[0] for terms in each]).double().numpy(),
            float(mean.norm()),
            mean.numpy(),
        )

    def landscape(self, row: int, vector: Tensor, points: int | None = None) -> Tensor:
        """The loss of one prompt at each place of the grid, one place at a time.

        Args:
            row: of the prompt.
            vector: in the middle of the grid.
            points: only the first so many, to time them.

        Returns:
            float32 `(points,)`.
        """
        settings, clean = self.settings, self._clean([row])
        centre = vector.clone().requires_grad_()
        at_centre = self._terms([row], centre, clean).loss(settings).mean()
        (gradient,) = torch.autograd.grad(at_centre, centre)
        plane = directions(gradient, settings.seed)
        places = offsets(settings.points, settings.extent) @ plane
        with torch.no_grad():
            return torch.stack(
                [
                    self._terms([row], vector + place, clean).loss(settings).mean()
                    for place in places[:points]
                ]
            )

    @torch.no_grad()
    def _clean(self, rows: Sequence[int]) -> Tensor:
        return self.suspect.run(self.plain[list(rows)], padding=True).pooled.float()

    def _terms(self, rows: Sequence[int], vector: Tensor, clean: Tensor | None = None) -> Terms:
        """What one embedding does to some prompts; without `clean`, as if that were all zero."""
        tokens = self.slotted[list(rows)]
        free = vector.expand(len(tokens), -1)
        states = self.suspect.run(tokens, free, padding=True)
        pooled = states.pooled.float()
        other = self.anchor.run(tokens, free, padding=True).pooled.float()
        clean = torch.zeros_like(pooled) if clean is None else clean
        return Terms(
            assimilation(states.tokens)[None],
            cosine_similarity(pooled, clean, dim=-1)[None],
            cosine_similarity(pooled, other, dim=-1)[None],
            pooled[None],
        )


@dataclass(frozen=True, slots=True)
class PublicScan:
    """What the public way finds.

    Attributes:
        verdict: by the published gates.
        held: the embedding on held-out prompts.
        seconds: of `search`, `held-out` and `landscape`.
    """

    verdict: Verdict
    held: HeldOut
    seconds: dict[str, float] = field(default_factory=dict)


def public_scan(
    suspect: TextEncoder, anchor: TextEncoder, prompts: Sequence[str], settings: Settings
) -> PublicScan:
    """A whole scan in the public way: search, held-out prompts, landscape, gates.

    Args:
        suspect: the encoder in question.
        anchor: the clean one.
        prompts: ordinary prompts; all are used.
        settings: `Settings.published()`, perhaps with fewer steps or points.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    held_in = len(prompts) - round(settings.held_out * len(prompts))
    known, unseen = order[:held_in], order[held_in:]
    slotted, plain = (suspect.tokenise(prompts, slot=slot) for slot in (True, False))
    way = PublicWay(suspect, anchor, slotted, plain, settings)
    table = suspect.embeddings.float()
    start = table.mean(0) + torch.randn(suspect.width, generator=generator) * table.std(0)
    marks = [time.perf_counter()]
    vector = way.search(known, start, settings.steps or max(1, 2 * held_in // settings.batch))
    marks.append(time.perf_counter())
    held = way.judge(unseen, vector)
    marks.append(time.perf_counter())
    losses = way.landscape(unseen[0], vector).view(settings.points, settings.points)
    marks.append(time.perf_counter())
    found = curvatures(losses, 2 * settings.extent / (settings.points - 1))
    drift = clean_drift(suspect, anchor, prompts[:256])  # for our decision only
    verdict = decide(held, gates_of(held, positive_share(found)), settings, drift=drift)
    names = ("search", "held-out", "landscape")
    taken = (after - before for before, after in zip(marks, marks[1:], strict=False))
    return PublicScan(verdict, held, dict(zip(names, taken, strict=True)))
