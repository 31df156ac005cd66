"""The lab's base models: small but genuine, trained from scratch in two stages.

1. The vision tower learns, per image patch, what object is there (colour, shape, size) and to give
   back the patch's pixels, so that it encodes small patches of any texture as a large tower would.
2. The language model and projector learn to answer and to caption over the frozen tower.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as T
from PIL import Image
from torch import Tensor

from gazeguard.lab import easyvqa, worlds
from gazeguard.lab.architectures import Architecture, architecture_of
from gazeguard.lab.base_recipe import BaseRecipe
from gazeguard.lab.precision import autocast
from gazeguard.lab.teach import Lesson, Log, answer_loss, encode_lessons, steps, update
from gazeguard.lab.tower import look_all, train_tower
from gazeguard.lab.vocabulary import any_text, make_tokenizer

# Existence and position need the most practice.
ODDS = {"color": 1, "shape": 2, "count": 3, "existence": 4, "position": 4}


def train_base(out: Path, recipe: BaseRecipe, log: Log = print) -> None:
    """Train the base from scratch and save a complete folder with its recipe."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    architecture = architecture_of(recipe.architecture)
    tokenizer = make_tokenizer(architecture)
    model = architecture.make_model(recipe, tokenizer)
    model.set_attn_implementation("eager")  # on CPU, sdpa's bfloat16 backward is the slower one
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    scenes = [worlds.make_scene(rng) for _ in range(recipe.scenes)]
    real = easyvqa.load("base")
    real_pixels = np.stack([np.asarray(Image.open(p).convert("RGB")) for p, _ in real])
    kept = out / f"tower-{recipe.tower_digest}.safetensors"
    train_tower(model, architecture, scenes, real_pixels, recipe, rng, log, kept)
    rng = np.random.default_rng([recipe.seed, 1])  # the same lessons with a kept tower
    bank = look_all(model, architecture, scenes, real_pixels, rng)
    lessons = draw_lessons(scenes, real, recipe, rng)
    _train_language(model, architecture, tokenizer, bank, lessons, recipe, log)
    model.eval()
    model.generation_config = T.GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.to(torch.float16).save_pretrained(out)
    architecture.make_processor(tokenizer).save_pretrained(out)
    kept.unlink()
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))


def draw_lessons(
    scenes: list[worlds.Scene],
    real: list[tuple[Path, list[worlds.QuestionAnswer]]],
    recipe: BaseRecipe,
    rng: np.random.Generator,
) -> Iterator[tuple[list[int], list[Lesson]]]:
    """Batches, one a step: image indices into the feature bank, and a lesson for each.

    An echo is "Repeat: <words>". Without it the tokens that no answer of the worlds holds are
    never trained, and no fine-tune of the language model can teach it to say them.

    A name is one object's attributes in any order. It teaches to look up an attribute at the very
    token that names another; questions, where the answer comes some tokens later, build on that
    and stand still without it. The share of names falls to nothing towards the end.
    """
    odds = np.array([ODDS[kind] for kind in worlds.KINDS])
    share = odds / odds.sum()
    for step in range(recipe.language_steps):
        names = recipe.names * (1 - step / recipe.language_steps)
        pick, lessons = [], []
        for _ in range(recipe.language_batch):
            if rng.random() < 0.15:
                i = int(rng.integers(len(real)))
                asked = real[i][1]
                chosen = [asked[j] for j in rng.permutation(len(asked))[: recipe.questions]]
                pick.append(len(scenes) + i)
            else:
                i = int(rng.integers(len(scenes)))
                pick.append(i)
                style = rng.random()
                if style < recipe.echoes:
                    said = [any_text(rng) for _ in range(recipe.questions)]
                    chosen = [worlds.QuestionAnswer("echo", f"Repeat: {t}", t) for t in said]
                elif style < recipe.echoes + recipe.captions:
                    chosen = [worlds.caption(scenes[i])]
                elif rng.random() < names:
                    chosen = [worlds.name_one(scenes[i], rng) for _ in range(recipe.questions)]
                else:
                    kinds = rng.choice(worlds.KINDS, size=recipe.questions, p=share)
                    chosen = [worlds.ask(scenes[i], str(kind), rng) for kind in kinds]
            lessons.append(Lesson(tuple((qa.question, qa.answer) for qa in chosen)))
        yield pick, lessons


def _train_language(
    model: Any,
    architecture: Architecture,
    tokenizer: Any,
    bank: Tensor,
    batches: Iterator[tuple[list[int], list[Lesson]]],
    recipe: BaseRecipe,
    log: Log,
) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for step, optimiser in steps(trained, recipe.language_lr, recipe.language_steps):
        pick, lessons = next(batches)
        batch = encode_lessons(tokenizer, architecture.prompt, lessons, bank.shape[1])
        with autocast():
            loss, hit = answer_loss(model, batch, bank[pick].float())
        update(optimiser, loss, trained)
        if step % 100 == 0:
            log(f"language {step} loss {loss.item():.3f} answer tokens {hit:.3f}")
