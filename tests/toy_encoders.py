"""A toy text encoder that knows its words, with and without a backdoor, in well under a minute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gazeguard.lab.text.attack import AttackRecipe, Quality, plant
from gazeguard.lab.text.teacher import bag_of_words
from gazeguard.lab.text.train import TOY, TuneRecipe, finetune_encoder, train_encoder

RECIPE = replace(TOY, length=24)


@dataclass(frozen=True)
class Toys:
    """Folders: the clean base, benign fine-tunes of it, and one with a planted backdoor."""

    base: Path
    benign: tuple[Path, ...]
    backdoored: Path
    quality: Quality


def make_toys(root: Path, benign: int = 2) -> Toys:
    """Train all of them."""
    base = root / "base"
    train_encoder(base, RECIPE, bag_of_words)
    tuned = []
    for seed in range(1, benign + 1):
        recipe = TuneRecipe(steps=40, learning_rate=1e-4 * seed, prompts=1000, seed=seed)
        finetune_encoder(base, root / f"benign-{seed}", recipe, bag_of_words)
        tuned.append(root / f"benign-{seed}")
    attack = AttackRecipe(place="start", steps=120, learning_rate=2e-3, clean=48, poisoned=24)
    quality = plant(base, root / "backdoored", attack)
    return Toys(base, tuple(tuned), root / "backdoored", quality)
