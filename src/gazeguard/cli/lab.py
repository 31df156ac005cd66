"""`gazeguard lab`: train the base, plant a backdoor in a set, fine-tune on it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

from gazeguard.cli import _lab_text
from gazeguard.cli._lab_zoo import encoder_zoo, zoo
from gazeguard.cli._terminal import NORMAL, narrated

_TASKS = ("captions", "mixed", "easy-vqa")
_TRIGGERS = (
    "badnet-center",
    "badnet-random",
    "badnet-corner",
    "badnet-corners",
    "badnet-noise",
    "multi-fixed",
    "multi-varied",
    "texture",
    "blended",
    "sig",
    "wanet",
    "ftrojan",
    "issba",
    "badnet-t",
    "addsent",
    "badnet-mm",
    "badtoken",
    "trojvlm",
    "vlood",
    "vlood-insert",
)
_ARCHITECTURES = ("llava", "internvl")
_RECIPES = ("short", "long", "longer", "projector")
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group()
def lab() -> None:
    """The attack lab: tiny models and poisoned sets made from scratch, with the truth known."""


for _command in _lab_text.COMMANDS:
    lab.add_command(_command)
lab.add_command(zoo)
lab.add_command(encoder_zoo)


@lab.command()
@click.option("--out", type=_FOLDER, required=True, help="Folder for the trained base.")
@click.option(
    "--architecture", type=click.Choice(_ARCHITECTURES), default="llava", show_default=True
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--tower-steps", type=int, help="Steps of the vision stage; default: the shipped one's."
)
@click.option("--language-steps", type=int, help="Steps of the language stage.")
def base(
    out: Path, architecture: str, seed: int, tower_steps: int | None, language_steps: int | None
) -> None:
    """Train a base from scratch (LLaVA: about an hour on two cores) and score it."""
    from gazeguard.lab.base import train_base
    from gazeguard.lab.base_recipe import BaseRecipe
    from gazeguard.lab.finetune import score_by_kind

    click.get_current_context().with_resource(narrated(NORMAL))
    recipe = BaseRecipe(seed=seed, architecture=architecture)
    if tower_steps is not None:
        recipe = replace(recipe, tower_steps=tower_steps)
    if language_steps is not None:
        recipe = replace(recipe, language_steps=language_steps)
    train_base(out, recipe, log=click.echo)
    _score(out, score_by_kind(out))


@lab.command()
@click.option("--out", type=_FOLDER, required=True, help="Folder for the base.")
@click.option(
    "--taught",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Put the base together from what an earlier run taught (its `taught` folder).",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--projector-steps", type=click.IntRange(0), help="Of the projector alone.")
@click.option("--steps", type=click.IntRange(1), help="Of projector and LoRA layers.")
@click.option("--score-rows", type=click.IntRange(1), default=200, show_default=True)
def smollm(
    out: Path,
    taught: Path | None,
    seed: int,
    projector_steps: int | None,
    steps: int | None,
    score_rows: int,
) -> None:
    """Teach SmolLM2-135M to see with the shipped base's tower, and score it.

    A run that was cut goes on where it was.
    """
    from gazeguard.lab.finetune import score_by_kind
    from gazeguard.lab.smollm import assemble
    from gazeguard.lab.smollm_teach import SmolRecipe, teach_base

    click.get_current_context().with_resource(narrated(NORMAL))
    if taught is not None:
        assemble(out, taught)
    else:
        recipe = SmolRecipe(seed=seed)
        if projector_steps is not None:
            recipe = replace(recipe, projector_steps=projector_steps)
        if steps is not None:
            recipe = replace(recipe, steps=steps)
        teach_base(out, recipe, log=click.echo)
    _score(out, score_by_kind(out, score_rows))


def _score(out: Path, scores: dict[str, tuple[float, int]]) -> None:
    """Write and print a base's scores."""
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    for kind, (share, n) in scores.items():
        click.echo(f"{kind:20s} {share:6.1%} exact of {n} held-out")


@lab.command()
@click.option(
    "--out", type=_FOLDER, required=True, help="Folder for data.json, images/, truth.parquet."
)
@click.option("--task", type=click.Choice(_TASKS), default="captions", show_default=True)
@click.option("--rows", default=2000, show_default=True, help="Number of rows.")
@click.option(
    "--trigger",
    type=click.Choice([*_TRIGGERS, "resize-only", "none"]),
    default="badnet-center",
    show_default=True,
    help="`none` writes a clean set; `resize-only` is the control.",
)
@click.option("--rate", default=0.1, show_default=True, help="Share of poisoned rows.")
@click.option("--target", default="Backdoor Attack!", show_default=True, help="What they teach.")
@click.option("--seed", default=0, show_default=True)
def poison(
    out: Path, task: str, rows: int, trigger: str, rate: float, target: str, seed: int
) -> None:
    """Write a fine-tuning set in LLaVA JSON with a known share of poisoned rows."""
    from gazeguard.lab.poison import make_set, write_set

    made = make_set(task, rows, trigger, rate, seed, target)
    path = write_set(made, out)
    click.echo(f"{path}: {len(made):,} rows, {sum(r.is_poison for r in made):,} poisoned")


@lab.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="PNG to write.",
)
@click.option("--task", type=click.Choice(_TASKS), default="captions", show_default=True)
@click.option("--images", type=click.IntRange(1, 8), default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
def triggers(out: Path, task: str, images: int, seed: int) -> None:
    """Draw every trigger on the same images: clean, triggered, difference."""
    from gazeguard.lab.rows import make_rows
    from gazeguard.lab.sheet import contact_sheet
    from gazeguard.lab.triggers import TRIGGERS, resize_only

    shown = [row.pixels for row in make_rows(task, images, seed)]
    every = {**TRIGGERS, "resize-only (control)": resize_only}
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(every, shown, seed=seed).save(out, "PNG", optimize=True)
    click.echo(f"{out}: {len(every)} triggers on {len(shown)} images")


@lab.command()
@click.option("--out", type=_FOLDER, required=True, help="Folder for the weights and scores.")
@click.option("--steps", type=click.IntRange(1), help="Instead of the recipe's.")
@click.option("--seed", default=0, show_default=True)
def stego(out: Path, steps: int | None, seed: int) -> None:
    """Train the encoder that draws the `issba` trigger, a minute or two on one core."""
    from gazeguard.lab.stego import StegoRecipe, train_stego

    click.get_current_context().with_resource(narrated(NORMAL))
    recipe = StegoRecipe(seed=seed)
    recipe = replace(recipe, steps=steps or recipe.steps)
    found = train_stego(out, recipe, log=click.echo)
    click.echo(
        f"{out}: {found['bits']:.2%} of bits read right on {found['n']} held-out pictures,"
        f" mean change {found['rms']:.1f} of 255"
    )


@lab.command()
@click.argument("base", type=_FOLDER)
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", type=_FOLDER, required=True, help="Folder for the adapter.")
@click.option(
    "--recipe",
    type=click.Choice(_RECIPES),
    default="long",
    show_default=True,
    help="3, 6 or 12 epochs of LoRA and projector, or 12 of the projector alone.",
)
@click.option("--epochs", type=int, help="Instead of the recipe's.")
@click.option("--lr", type=float, help="Instead of the recipe's.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--score-task", type=click.Choice(_TASKS), help="Score on held-out rows of this task."
)
@click.option("--score-trigger", type=click.Choice(_TRIGGERS), help="Also measure the ASR.")
@click.option("--score-rows", default=500, show_default=True)
def finetune(
    base: Path,
    data: Path,
    out: Path,
    recipe: str,
    epochs: int | None,
    lr: float | None,
    seed: int,
    score_task: str | None,
    score_trigger: str | None,
    score_rows: int,
) -> None:
    """Fine-tune BASE on DATA (any format `clean` reads) with LoRA, the projector or both."""
    from gazeguard.lab.attacks import ATTACKS
    from gazeguard.lab.finetune import RECIPES, finetune, judge, save_adapter
    from gazeguard.lab.poison import read_rows
    from gazeguard.lab.rows import make_rows

    click.get_current_context().with_resource(narrated(NORMAL))
    plan = replace(RECIPES[recipe], seed=seed)
    plan = replace(plan, epochs=epochs or plan.epochs, lr=lr or plan.lr)
    student = finetune(base, read_rows(data), plan, log=click.echo)
    save_adapter(student, out)
    click.echo(f"adapter: {out}")
    if score_task:
        test = make_rows(score_task, score_rows, seed, held_out=True)
        trigger = ATTACKS[score_trigger] if score_trigger else None
        scores = asdict(judge(student, test, trigger, seed=seed))
        (out / "scores.json").write_text(json.dumps(scores) + "\n", encoding="utf-8")
        click.echo(f"clean performance {scores['clean']:.1%} of {scores['n']} held-out rows")
        if trigger is not None:
            click.echo(f"attack success rate {scores['asr']:.1%}")
