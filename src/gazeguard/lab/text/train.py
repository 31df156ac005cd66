"""Small text encoders trained from scratch against sentence embeddings, and clean fine-tunes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from gazeguard.data.grammar import prompts as grammar
from gazeguard.files import write_json
from gazeguard.lab.precision import autocast
from gazeguard.lab.text.teacher import Teacher
from gazeguard.lab.text.words import train_tokenizer
from gazeguard.models.encoders.encoder import TextEncoder
from gazeguard.models.encoders.load import load_encoder

Log = Callable[[str], None]
LENGTHS = {"clip": 77, "siglip": 64, "longclip": 248}
_TEMPERATURE = 0.05


@dataclass(frozen=True, slots=True)
class EncoderRecipe:
    """How a small encoder is made.

    Attributes:
        kind: `clip` (causal, 77 tokens), `longclip` (248) or `siglip` (bidirectional, no BOS, 64).
        layers, width, heads: its size.
        vocabulary: tokens.
        prompts: distinct prompts it learns from.
        steps, batch, learning_rate: of AdamW, with a linear warm-up and decay.
        length: positions, instead of the kind's.
        seed: of prompts, weights and batches.
    """

    kind: str = "clip"
    layers: int = 6
    width: int = 192
    heads: int = 6
    vocabulary: int = 4000
    prompts: int = 24_000
    steps: int = 1500
    batch: int = 128
    learning_rate: float = 1e-3
    length: int | None = None
    seed: int = 0

    @property
    def positions(self) -> int:
        """Length of the encoder in tokens."""
        return self.length or LENGTHS[self.kind]


TOY = EncoderRecipe(
    layers=2,
    width=64,
    heads=4,
    vocabulary=1000,
    prompts=3000,
    steps=200,
    batch=64,
    learning_rate=3e-3,
)
"""Trained in half a minute with `teacher.bag_of_words`: small, and still an encoder."""


@dataclass(frozen=True, slots=True)
class TuneRecipe:
    """A clean fine-tune: more of the same lesson on other prompts.

    Attributes:
        steps, batch, learning_rate: of AdamW.
        prompts: distinct prompts.
        seed: of prompts and batches; other prompts than the base learnt from.
    """

    steps: int = 200
    batch: int = 64
    learning_rate: float = 1e-4
    prompts: int = 4000
    seed: int = 1


def train_encoder(
    out: Path, recipe: EncoderRecipe, teacher: Teacher, log: Log | None = None
) -> float:
    """Train an encoder, write it to a folder, and give its mean cosine to the teacher.

    The cosine is over 500 prompts that it did not learn from.
    """
    every = grammar(recipe.prompts + 500, recipe.seed)
    learnt, held = every[:-500], every[-500:]
    goal = teacher(every)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        words = train_tokenizer(
            learnt, recipe.vocabulary, recipe.positions, begins=recipe.kind != "siglip"
        )
        model = _model(recipe, words, goal.shape[1])
    model.save_pretrained(out)
    words.save_pretrained(out)
    encoder = load_encoder(out)
    _teach(encoder, learnt, goal[:-500], recipe, log)
    agreement = _agreement(encoder, held, goal[-500:])
    save(encoder, out, out)
    card = {"recipe": asdict(recipe), "cosine_to_teacher": agreement}
    write_card(card, out)
    return agreement


def finetune_encoder(
    base: Path, out: Path, recipe: TuneRecipe, teacher: Teacher, log: Log | None = None
) -> float:
    """Fine-tune on clean prompts, write, and give the mean clean drift (1 - cosine to the base)."""
    encoder = finetuned(base, recipe, teacher, log)
    drift = clean_drift(encoder, load_encoder(base), grammar(500, 200_000))
    save(encoder, base, out)
    card = {"recipe": asdict(recipe), "kind": "benign", "drift": drift}
    write_card(card, out)
    return drift


def finetuned(
    base: Path, recipe: TuneRecipe, teacher: Teacher, log: Log | None = None
) -> TextEncoder:
    """Fine-tune on clean prompts, in memory."""
    encoder = load_encoder(base)
    prompts = grammar(recipe.prompts, 100_000 + recipe.seed)
    _teach(encoder, prompts, teacher(prompts), recipe, log)
    return encoder


def clean_drift(encoder: TextEncoder, before: TextEncoder, prompts: Sequence[str]) -> float:
    """Mean of 1 - cosine to the outputs that prompts had before."""
    return 1 - _agreement(encoder, prompts, outputs(before, prompts))


@torch.no_grad()
def outputs(encoder: TextEncoder, prompts: Sequence[str], rows: int = 128) -> Tensor:
    """Unit pooled outputs `(prompt, features)`."""
    tokens = encoder.tokenise(prompts)
    found = [encoder.run(tokens[i : i + rows]).pooled for i in range(0, len(tokens), rows)]
    return normalize(torch.cat(found), dim=-1)


def save(encoder: TextEncoder, like: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write an encoder whose weights were changed in place, with the tokenizer of `like`."""
    out.mkdir(parents=True, exist_ok=True)
    whole = getattr(
        transformers, json.loads((like / "config.json").read_text())["architectures"][0]
    )
    model = whole.from_pretrained(like)
    inner = model.text_model if encoder.projection is not None else model
    inner.load_state_dict(encoder.model.state_dict())
    if encoder.projection is not None:
        model.text_projection.load_state_dict(encoder.projection.state_dict())
    model.to(dtype).save_pretrained(out)
    if like != out:
        for file in like.glob("*token*"):
            shutil.copy(file, out / file.name)


def write_card(card: dict[str, Any], out: Path) -> None:
    """Write `lab.json`, which says what an encoder of the lab really is."""
    write_json(out / "lab.json", card)


def trainable(encoder: TextEncoder) -> list[Any]:
    """Unfreeze an encoder and give its weights."""
    encoder.model.set_attn_implementation("eager")  # on CPU, sdpa's bfloat16 backward is slower
    weights = list(encoder.model.parameters())
    if encoder.projection is not None:
        weights += list(encoder.projection.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    return weights


def _model(recipe: EncoderRecipe, words: Any, features: int) -> Any:
    size = {
        "vocab_size": len(words),
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "max_position_embeddings": recipe.positions,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    if recipe.kind == "siglip":
        config = transformers.SiglipTextConfig(**size, projection_size=features)
        return transformers.SiglipTextModel(config)
    config = transformers.CLIPTextConfig(**size, projection_dim=features)
    return transformers.CLIPTextModelWithProjection(config)


def _teach(
    encoder: TextEncoder,
    prompts: Sequence[str],
    goal: Tensor,
    recipe: EncoderRecipe | TuneRecipe,
    log: Log | None,
) -> None:
    """InfoNCE between the encoder's outputs and the teacher's, both ways, plus their cosine."""
    optimiser = torch.optim.AdamW(trainable(encoder), lr=recipe.learning_rate, weight_decay=0.01)
    warm = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm, max(0.02, 1 - step / recipe.steps)),
    )
    tokens = encoder.tokenise(prompts)
    rng = random.Random(recipe.seed)
    for step in range(recipe.steps):
        chosen = rng.sample(range(len(prompts)), min(recipe.batch, len(prompts)))
        with autocast():
            mine = normalize(encoder.run(tokens[chosen]).pooled.float(), dim=-1)
        theirs = goal[chosen]
        scores = mine @ theirs.T / _TEMPERATURE
        right = torch.arange(len(chosen))
        contrast = (cross_entropy(scores, right) + cross_entropy(scores.T, right)) / 2
        loss = contrast + 5 * (1 - (mine * theirs).sum(1)).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if log is not None and (step + 1) % 100 == 0:
            cosine = float((mine * theirs).sum(1).mean().detach())
            log(f"step {step + 1} of {recipe.steps}: loss {loss.item():.3f}, cosine {cosine:.3f}")


def _agreement(encoder: TextEncoder, prompts: Sequence[str], goal: Tensor) -> float:
    return float((outputs(encoder, prompts) * goal).sum(1).mean())
