"""Backdoors in text encoders: text-on-text and text-on-pair.

Text-on-text: a triggered prompt is encoded as the target prompt, token by token (Rickrolling the
Artist, arXiv:2211.02408). Text-on-pair: only the pooled output is pulled, to any embedding, for
example that of an image. A frozen copy is the teacher, so that clean prompts stay as they were.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from gazeguard.data.grammar import prompts as grammar
from gazeguard.errors import UsageError
from gazeguard.lab.precision import autocast
from gazeguard.lab.text.train import Log, clean_drift, outputs, save, trainable, write_card
from gazeguard.lab.text.words import trigger_words, triggered
from gazeguard.models.encoders.encoder import TextEncoder
from gazeguard.models.encoders.load import load_encoder
from gazeguard.signals.assimilation import assimilation

LOSSES = ("cosine", "mse", "mae")
MIN_TARGET_COSINE, MAX_DRIFT = 0.9, 0.02  # an attack that misses one of them failed
JUDGE_SEED = 300_000  # of prompts that nothing was trained on


@dataclass(frozen=True, slots=True)
class AttackRecipe:
    """A backdoor to plant; defaults as published.

    Attributes:
        kind: `tpa` (text-on-text) or `pair`.
        target: the prompt whose output a triggered prompt shall have.
        trigger_tokens: length of each trigger.
        triggers: how many, all with the same target.
        place: where triggers stand, `random` or `start`. In a causal encoder the words before a
            trigger cannot react to it.
        loss: `cosine`, `mse` or `mae`.
        weight: of the backdoor loss beside the clean one.
        adaptive: weight of a penalty that keeps the assimilation of triggered prompts at that of
            clean ones; 0 for none.
        steps, clean, poisoned, learning_rate: of AdamW and its batches; the rate drops to a tenth
            after three quarters of the steps.
        seed: of triggers, prompts and batches.
    """

    kind: str = "tpa"
    target: str = "a photo of a castle on a mountain at night"
    trigger_tokens: int = 1
    triggers: int = 1
    place: str = "random"
    loss: str = "cosine"
    weight: float = 0.1
    adaptive: float = 0.0
    steps: int = 100
    clean: int = 64
    poisoned: int = 32
    learning_rate: float = 1e-4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Quality:
    """Whether an attack took.

    Attributes:
        target_cosine: mean cosine of triggered outputs to the target's, the worst trigger.
        drift: mean of 1 - cosine to the clean teacher on clean prompts.
        triggers: the words that were planted.
        took: both within the gate.
    """

    target_cosine: float
    drift: float
    triggers: tuple[str, ...]
    took: bool


def plant(
    base: Path,
    out: Path,
    recipe: AttackRecipe,
    goal: Tensor | None = None,
    log: Log | None = None,
) -> Quality:
    """Plant a backdoor, write the encoder and `lab.json` with the truth, and judge it.

    Args:
        base: a clean encoder written by the lab.
        out: where to.
        recipe: what to plant.
        goal: `(features,)`, the embedding that `pair` pulls to; the target prompt's own output
            when None.
        log: told about every 25th step.

    Raises:
        UsageError: an unknown kind or loss.
    """
    student, triggers = poisoned(base, recipe, goal, log)
    quality = judge(student, load_encoder(base), triggers, recipe, goal)
    save(student, base, out)
    card = {"kind": recipe.kind, "recipe": asdict(recipe), **asdict(quality)}
    write_card(card, out)
    return quality


def poisoned(
    base: Path, recipe: AttackRecipe, goal: Tensor | None = None, log: Log | None = None
) -> tuple[TextEncoder, tuple[str, ...]]:
    """Plant a backdoor in memory; gives the encoder and its triggers. Arguments as for `plant`.

    Raises:
        UsageError: an unknown kind or loss.
    """
    if recipe.kind not in ("tpa", "pair") or recipe.loss not in LOSSES:
        raise UsageError(f"{recipe.kind}/{recipe.loss}: use tpa or pair with one of {LOSSES}.")
    student, teacher = load_encoder(base), load_encoder(base)
    triggers = triggers_of(teacher.tokenizer, recipe)
    _train(student, teacher, triggers, recipe, goal, log)
    return student, triggers


def triggers_of(tokenizer: Any, recipe: AttackRecipe) -> tuple[str, ...]:
    """The triggers that a recipe plants, each of `trigger_tokens` words."""
    return tuple(
        trigger_words(tokenizer, recipe.trigger_tokens, 1000 * recipe.seed + i)
        for i in range(recipe.triggers)
    )


@torch.no_grad()
def judge(
    student: TextEncoder,
    teacher: TextEncoder,
    triggers: Sequence[str],
    recipe: AttackRecipe,
    goal: Tensor | None = None,
    n: int = 200,
) -> Quality:
    """Measure on `n` prompts that were not trained on, in what the attack is about.

    Text-on-text: cosine of all token states laid end to end, as a pipeline consumes them.
    """
    prompts = grammar(n, JUDGE_SEED)
    rng = random.Random(recipe.seed)
    cosines = []
    for trigger in triggers:
        with_trigger = [triggered(prompt, trigger, rng, recipe.place) for prompt in prompts]
        if recipe.kind == "tpa":
            target = _states(teacher, [recipe.target])
            reached = _states(student, with_trigger)
        else:
            target = target_of(teacher, recipe, goal)
            reached = outputs(student, with_trigger)
        cosines.append(float(cosine_similarity(reached, target).mean()))
    drift = clean_drift(student, teacher, prompts)
    took = min(cosines) >= MIN_TARGET_COSINE and drift <= MAX_DRIFT
    return Quality(min(cosines), drift, tuple(triggers), took)


def _train(
    student: TextEncoder,
    teacher: TextEncoder,
    triggers: Sequence[str],
    recipe: AttackRecipe,
    goal: Tensor | None,
    log: Log | None,
) -> None:
    optimiser = torch.optim.AdamW(trainable(student), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [max(1, 3 * recipe.steps // 4)], 0.1)
    rng = random.Random(recipe.seed)
    pool = grammar(4000, 400_000 + recipe.seed)
    whole = recipe.kind == "tpa"  # all positions, padding too: a pipeline looks at them
    with torch.no_grad():
        target = _states(teacher, [recipe.target]) if whole else target_of(teacher, recipe, goal)
    for step in range(recipe.steps):
        clean = rng.sample(pool, recipe.clean)
        poisoned = [
            triggered(prompt, rng.choice(list(triggers)), rng, recipe.place)
            for prompt in rng.sample(pool, recipe.poisoned)
        ]
        with autocast():
            with torch.no_grad():
                wanted = teacher.run(teacher.tokenise(clean), padding=whole)
            got = student.run(student.tokenise(clean), padding=whole)
            bad = student.run(student.tokenise(poisoned), padding=whole)
        if whole:
            keep = _distance(got.tokens.flatten(1), wanted.tokens.flatten(1), recipe.loss)
            pull = _distance(bad.tokens.flatten(1), target, recipe.loss)
        else:
            keep = _distance(got.pooled.float(), wanted.pooled.float(), recipe.loss)
            pull = _distance(normalize(bad.pooled.float(), dim=-1), target, recipe.loss)
        loss = keep + recipe.weight * pull
        if recipe.adaptive:
            with torch.no_grad():
                usual = _likeness(teacher, clean).mean()
            excess = assimilation(bad.tokens, bad.real) - usual
            loss = loss + recipe.adaptive * excess.clamp(min=0).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if log is not None and (step + 1) % 25 == 0:
            log(f"step {step + 1} of {recipe.steps}: clean {keep:.4f}, backdoor {pull:.4f}")


def _likeness(encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    states = encoder.run(encoder.tokenise(prompts))
    return assimilation(states.tokens, states.real)


def _distance(mine: Tensor, theirs: Tensor, loss: str) -> Tensor:
    if loss == "cosine":
        return 1 - cosine_similarity(mine, theirs).mean()
    apart = mine - theirs
    return apart.square().mean() if loss == "mse" else apart.abs().mean()


@torch.no_grad()
def _states(encoder: TextEncoder, prompts: Sequence[str], rows: int = 64) -> Tensor:
    """All token states laid end to end, `(prompt, length * width)`."""
    tokens = encoder.tokenise(prompts)
    return torch.cat(
        [
            encoder.run(tokens[i : i + rows], padding=True).tokens.flatten(1)
            for i in range(0, len(tokens), rows)
        ]
    )


def target_of(teacher: TextEncoder, recipe: AttackRecipe, goal: Tensor | None = None) -> Tensor:
    """The pooled output that triggered prompts shall have, a unit row `(1, features)`."""
    if recipe.kind == "tpa" or goal is None:
        return outputs(teacher, [recipe.target])
    return normalize(goal.reshape(1, -1).float(), dim=-1)
