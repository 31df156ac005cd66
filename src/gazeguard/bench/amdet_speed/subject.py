"""What is scanned: encoders of a true shape with random weights, and toys with a true answer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from gazeguard.data.grammar import prompts as grammar
from gazeguard.lab.text.attack import AttackRecipe, plant
from gazeguard.lab.text.teacher import bag_of_words
from gazeguard.lab.text.train import TOY, TuneRecipe, finetune_encoder, train_encoder
from gazeguard.lab.text.words import train_tokenizer
from gazeguard.models.encoders.encoder import TextEncoder
from gazeguard.models.encoders.kinds import KINDS
from gazeguard.models.encoders.load import load_encoder

_LEARNT = 1000  # prompts behind a random encoder's tokenizer, so that prompts have usual lengths
_APART = 0.02  # of a random suspect's weights from its anchor's, in units of their spread


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a CLIP text encoder; the default is that of ViT-B/32 and Stable Diffusion's kin.

    Attributes:
        width, layers, heads, vocabulary, length: of the encoder.
    """

    width: int = 512
    layers: int = 12
    heads: int = 8
    vocabulary: int = 49408
    length: int = 77


@dataclass(frozen=True, slots=True)
class Pair:
    """A suspect and its clean anchor."""

    suspect: TextEncoder
    anchor: TextEncoder


def random_pair(shape: Shape, seed: int = 0) -> Pair:
    """Random weights, and the same a little moved: for times and memory, not for verdicts."""
    words = _words(shape.length)
    config = transformers.CLIPTextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length,
        projection_dim=shape.width,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.CLIPTextModelWithProjection(config).eval().requires_grad_(False)
        other = copy.deepcopy(model)
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight), alpha=_APART * float(weight.std()))
    made = [
        TextEncoder(m.text_model, m.text_projection, words, KINDS["clip"], name=name, folder=None)
        for m, name in ((other, "suspect"), (model, "anchor"))
    ]
    return Pair(*made)


@cache
def _words(length: int) -> Any:
    return train_tokenizer(grammar(_LEARNT, 0), 1000, length)


@dataclass(frozen=True, slots=True)
class Toys:
    """A small trained encoder as the anchor of one with a backdoor and of a benign fine-tune.

    Attributes:
        anchor, backdoored, benign: loaded.
        took: whether the backdoor passed the lab's quality gate.
    """

    anchor: TextEncoder
    backdoored: TextEncoder
    benign: TextEncoder
    took: bool


def toys(work: Path, quick: bool) -> Toys:
    """Train them, in a minute or two; with `quick` in seconds, and then nothing is promised."""
    recipe = TOY
    attack = AttackRecipe(place="start", steps=250, learning_rate=1e-3)
    if quick:
        recipe = replace(recipe, length=24, prompts=300, steps=5)
        attack = replace(attack, steps=3)
    tune = TuneRecipe(steps=2 if quick else 40, prompts=1000)
    base, bad, good = (work / name for name in ("anchor", "backdoored", "benign"))
    train_encoder(base, recipe, bag_of_words)
    quality = plant(base, bad, attack)
    finetune_encoder(base, good, tune, bag_of_words)
    return Toys(load_encoder(base), load_encoder(bad), load_encoder(good), quality.took)
