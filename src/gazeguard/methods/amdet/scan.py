"""AMDET from end to end on one loaded encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from gazeguard.errors import MeasurementError, ModelError
from gazeguard.methods.amdet.decision import Gate, References, decide, gates_of, leverage_of
from gazeguard.methods.amdet.evidence import Named, nearest_prompts, nearest_tokens
from gazeguard.methods.amdet.heldout import HeldOut, held_out
from gazeguard.methods.amdet.inversion import Progress, clean_outputs, invert
from gazeguard.methods.amdet.settings import PUBLISHED, Gates, Settings
from gazeguard.methods.amdet.surface import Surface, surface
from gazeguard.models.encoders.encoder import TextEncoder
from gazeguard.types import Finding, Verdict

_KIN = 256  # prompts that tell whether an anchor belongs to a suspect


@dataclass(frozen=True, slots=True, eq=False)
class EncoderScan:
    """What was found in one encoder.

    Attributes:
        verdict: the answer, with its evidence in words.
        gates: the four gates with their values.
        held: the most suspicious embedding on held-out prompts.
        surface: the landscape around it.
        vectors: float32 `(restart, width)`, the embeddings that were searched to the end.
        best: which of them is the most suspicious.
        drift: of clean outputs, the mean of 1 - cosine to the anchor's.
        leverage: the score of the most suspicious embedding beside that drift.
        scores: the score of each.
        losses: float32 `(step, restart)` of the search.
        tokens, prompts: nearest vocabulary tokens to the embedding, nearest prompts to its target.
    """

    verdict: Verdict
    gates: tuple[Gate, ...]
    held: HeldOut
    surface: Surface
    vectors: Tensor
    best: int
    drift: float
    leverage: float
    scores: tuple[float, ...]
    losses: NDArray[np.float32]
    tokens: Named
    prompts: Named


def scan_encoder(
    suspect: TextEncoder,
    anchor: TextEncoder,
    prompts: Sequence[str],
    settings: Settings | None = None,
    references: References | None = None,
    constants: Gates = PUBLISHED,
    progress: Progress | None = None,
) -> EncoderScan:
    """Search a trigger-like embedding, judge it on held-out prompts, and decide.

    Args:
        suspect: the encoder in question.
        anchor: a clean encoder that it was made from, or one of the same family and size.
        prompts: ordinary prompts; the settings say how many are used.
        settings: of search and judgement.
        references: benign fine-tunes scanned with these settings, or None for published gates.
        constants: of the gates.
        progress: called with steps done and steps in all.

    Raises:
        ModelError: the anchor has another width.
        MeasurementError: nothing can be judged: weights or outputs that are not finite, too few
            prompts, an anchor that does not belong to the suspect.
    """
    settings = settings or Settings()
    suspect, anchor = _comparable(suspect, anchor)
    used = list(dict.fromkeys(prompts))[: settings.prompts]
    if len(used) < 2 or settings.held_out * len(used) < settings.min_prompts:
        raise MeasurementError(
            f"{len(used)} distinct prompts are too few: give at least"
            f" {int(np.ceil(settings.min_prompts / settings.held_out))}, or none to use the"
            " built-in ones."
        )
    suspect.check_finite()
    anchor.check_finite()
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(used), generator=generator).tolist()
    used = [used[i] for i in order]
    held_in = len(used) - round(settings.held_out * len(used))
    plain = suspect.tokenise(used)
    _same_tokens(suspect, anchor, used)
    clean_anchor = clean_outputs(anchor, plain, settings.rows)
    few = plain[:_KIN]
    clean = clean_outputs(suspect, few, settings.rows)
    _kin(clean, clean_anchor[:_KIN], suspect, anchor, settings)
    drift = 1 - float(cosine_similarity(clean, clean_anchor[:_KIN]).mean())

    tokens = suspect.tokenise(used, slot=True)
    found = invert(suspect, anchor, tokens[:held_in], plain[:held_in], settings, progress)
    judged = held_out(suspect, anchor, tokens[held_in:], found.vectors, settings)
    usable = [i for i, held in enumerate(judged) if held.finite]
    if not usable:
        raise MeasurementError(
            f"the outputs of {suspect.name} are not finite: copy or download the model again."
        )
    best = max(usable, key=lambda i: judged[i].score)
    behind = slice(held_in, held_in + settings.surface_prompts)
    shape = surface(suspect, anchor, tokens[behind], plain[behind], found.vectors[best], settings)
    gates = gates_of(judged[best], shape.positive, constants)
    verdict = decide(judged[best], gates, settings, references, drift)
    near_tokens = nearest_tokens(suspect, found.vectors[best])
    near_prompts = nearest_prompts(judged[best].target, clean_anchor, used)
    cut = suspect.too_long(used)
    return EncoderScan(
        verdict=replace(
            verdict, evidence=(*verdict.evidence, *_words(near_tokens, near_prompts, cut, suspect))
        ),
        gates=gates,
        held=judged[best],
        surface=shape,
        vectors=found.vectors,
        best=best,
        drift=drift,
        leverage=leverage_of(judged[best].score, drift),
        scores=tuple(held.score for held in judged),
        losses=found.losses.numpy(),
        tokens=near_tokens,
        prompts=near_prompts,
    )


def _comparable(suspect: TextEncoder, anchor: TextEncoder) -> tuple[TextEncoder, TextEncoder]:
    """Both with or both without a projection; refuses what no embedding can be put into."""
    if suspect.width != anchor.width:
        raise ModelError(
            f"the anchor {anchor.name} has embeddings of width {anchor.width}, {suspect.name} of"
            f" {suspect.width}: give the encoder that the suspect was made from."
        )
    if (suspect.projection is None) != (anchor.projection is None):
        return suspect.unprojected(), anchor.unprojected()
    return suspect, anchor


def _same_tokens(suspect: TextEncoder, anchor: TextEncoder, prompts: Sequence[str]) -> None:
    same = suspect.slot == anchor.slot and suspect.length == anchor.length
    if same:
        few = list(prompts[:50])
        same = bool(torch.equal(suspect.tokenise(few).ids, anchor.tokenise(few).ids))
    if not same:
        raise MeasurementError(
            f"{anchor.name} splits prompts into other tokens than {suspect.name}: give the encoder"
            " that the suspect was made from as the anchor."
        )


def _kin(
    clean: Tensor, other: Tensor, suspect: TextEncoder, anchor: TextEncoder, settings: Settings
) -> None:
    """Whether both say similar things about ordinary prompts, up to what all prompts share."""
    if not torch.isfinite(clean).all() or not torch.isfinite(other).all():
        bad = suspect if not torch.isfinite(clean).all() else anchor
        raise MeasurementError(
            f"the outputs of {bad.name} are not finite: copy or download the model again."
        )
    if clean.shape == other.shape:
        mine, theirs = (
            normalize(unit - unit.mean(0), dim=-1)
            for unit in (normalize(clean, dim=-1), normalize(other, dim=-1))
        )
        kinship = float((mine * theirs).sum(1).mean())
    else:
        kinship = 0.0
    if kinship < settings.min_kinship:
        raise MeasurementError(
            f"{anchor.name} and {suspect.name} say different things about ordinary prompts"
            f" (agreement {kinship:.2f}, at least {settings.min_kinship:g} is needed): give the"
            " encoder that the suspect was made from as the anchor."
        )


def _words(tokens: Named, prompts: Named, cut: int, suspect: TextEncoder) -> list[Finding]:
    found = [
        Finding(
            "Tokens nearest to the recovered embedding: "
            + ", ".join(f"'{word}' ({cosine:.2f})" for word, cosine in tokens[:5])
            + ".",
            {"nearest_tokens": [list(pair) for pair in tokens]},
        ),
        Finding(
            "Prompts nearest to what it makes of every prompt: "
            + ", ".join(f"'{prompt}' ({cosine:.2f})" for prompt, cosine in prompts[:3])
            + ".",
            {"nearest_prompts": [list(pair) for pair in prompts]},
        ),
    ]
    if cut:
        found.append(
            Finding(
                f"{cut:,} prompts are longer than the {suspect.length} tokens of the encoder and"
                " were cut.",
                {"cut_prompts": cut},
            )
        )
    return found
