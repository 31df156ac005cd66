"""The lab's verbs for text encoders: train one, plant a backdoor, fine-tune without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--out", type=_FOLDER, required=True, help="Folder for the encoder.")
@click.option(
    "--kind",
    type=click.Choice(["clip", "siglip", "longclip"]),
    default="clip",
    show_default=True,
    help="77 tokens and causal, 64 and bidirectional, or 248 and causal.",
)
@click.option("--steps", type=int, help="Instead of the recipe's.")
@click.option("--seed", default=0, show_default=True)
def encoder(out: Path, kind: str, steps: int | None, seed: int) -> None:
    """Train a small text encoder from scratch against MiniLM's sentence embeddings."""
    from gazeguard.lab.text.teacher import minilm
    from gazeguard.lab.text.train import EncoderRecipe, train_encoder

    recipe = EncoderRecipe(kind=kind, seed=seed)
    recipe = replace(recipe, steps=steps or recipe.steps)
    cosine = train_encoder(out, recipe, minilm(), log=click.echo)
    click.echo(f"{out}: cosine to the teacher {cosine:.3f} on 500 held-out prompts")


def _attack_options(command: Any) -> Any:
    options = (
        click.argument("base", type=_FOLDER),
        click.option("--out", type=_FOLDER, required=True, help="Folder for the encoder."),
        click.option("--target", help="Prompt that a triggered prompt is encoded as."),
        click.option("--trigger-tokens", default=1, show_default=True, help="Of each trigger."),
        click.option("--triggers", default=1, show_default=True, help="With the same target."),
        click.option("--place", type=click.Choice(["random", "start"]), default="random"),
        click.option("--loss", type=click.Choice(["cosine", "mse", "mae"]), default="cosine"),
        click.option("--adaptive", default=0.0, help="Weight of the assimilation penalty."),
        click.option("--weight", type=float, help="Of the backdoor loss, instead of 0.1."),
        click.option("--steps", type=int, help="Instead of 100."),
        click.option("--lr", type=float, help="Instead of 1e-4."),
        click.option("--seed", default=0, show_default=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@_attack_options
def tpa(**options: Any) -> None:
    """Plant text-on-text in BASE: a triggered prompt is encoded as the target prompt."""
    _plant("tpa", **options)


@click.command()
@_attack_options
def pair(**options: Any) -> None:
    """Plant text-on-pair in BASE: outputs are pulled to the target's sentence embedding."""
    _plant("pair", **options)


def _plant(kind: str, base: Path, out: Path, lr: float | None, **given: Any) -> None:
    from gazeguard.lab.text.attack import AttackRecipe, plant
    from gazeguard.lab.text.teacher import minilm

    chosen = {name: value for name, value in given.items() if value is not None}
    recipe = AttackRecipe(kind=kind, **chosen)
    recipe = replace(recipe, learning_rate=lr or recipe.learning_rate)
    goal = minilm()([recipe.target])[0] if kind == "pair" else None
    quality = plant(base, out, recipe, goal, log=click.echo)
    click.echo(
        f"{out}: cosine to the target {quality.target_cosine:.3f}, clean drift {quality.drift:.4f},"
        f" triggers {', '.join(quality.triggers)}: attack {'took' if quality.took else 'failed'}"
    )


@click.command("finetune-encoder")
@click.argument("base", type=_FOLDER)
@click.option("--out", type=_FOLDER, required=True, help="Folder for the encoder.")
@click.option("--steps", default=200, show_default=True)
@click.option("--lr", default=1e-4, show_default=True)
@click.option("--prompts", default=4000, show_default=True, help="Distinct clean prompts.")
@click.option("--seed", default=1, show_default=True)
def finetune_encoder(base: Path, out: Path, steps: int, lr: float, prompts: int, seed: int) -> None:
    """Fine-tune BASE on clean prompts: a benign twin for comparison and calibration."""
    from gazeguard.lab.text.teacher import minilm
    from gazeguard.lab.text.train import TuneRecipe
    from gazeguard.lab.text.train import finetune_encoder as finetune

    recipe = TuneRecipe(steps=steps, learning_rate=lr, prompts=prompts, seed=seed)
    drift = finetune(base, out, recipe, minilm(), log=click.echo)
    click.echo(f"{out}: clean drift {drift:.4f}")


COMMANDS = (encoder, tpa, pair, finetune_encoder)
