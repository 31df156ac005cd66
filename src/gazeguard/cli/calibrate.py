"""`gazeguard calibrate`: learn what clean inputs look like to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gazeguard.cli._options import (
    column_options,
    images_option,
    load_target,
    model_options,
    quiet_option,
)
from gazeguard.cli._terminal import NORMAL, QUIET, narrated, row_progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gazeguard.data.columns import Columns
    from gazeguard.guarding import Guard
    from gazeguard.types import Sample


def _layers(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Names stay, `6,7,8` becomes numbers."""
    if value is None or value in ("paper", "all", "auto"):
        return value
    try:
        return tuple(int(word) for word in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"'{value}' is neither paper, all, auto nor numbers such as 6,7,8.", ctx, param
        ) from None


def _prune(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """A number where it is one."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return value  # a name; the library knows which there are


@click.command()
@click.argument("model")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder for the guard.",
)
@click.option(
    "--alpha",
    default=0.01,
    show_default=True,
    metavar="A",
    help="Highest acceptable rate of false alarms.",
)
@click.option(
    "--setting",
    type=click.Choice(["paper", "all", "mahalanobis"]),
    help="Everything at once; paper is the published one.  [default: the recommended one]",
)
@click.option(
    "--layers",
    callback=_layers,
    metavar="L",
    help="Detection layers instead of the setting's: paper, all, auto, or numbers such as 6,7,8.",
)
@click.option(
    "--prune",
    callback=_prune,
    metavar="RULE",
    help="What is hidden instead of the setting's: search, widen, paper, balanced, code, or a "
    "multiple of the even share of attention.",
)
@click.option(
    "--witness",
    type=click.Choice(["all", "attention"]),
    default="all",
    show_default=True,
    help="all also compares with the model before its fine-tune, for a model with an adapter.",
)
@click.option(
    "--keep-outliers",
    is_flag=True,
    help="Accept rows that stand apart from all others, as poisoned ones would.",
)
@images_option
@column_options
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Use only the first N rows.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), metavar="N")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Of the split in halves.")
@model_options
@quiet_option
def calibrate(
    model: str,
    data: Path,
    out: Path,
    alpha: float,
    setting: str | None,
    layers: Any,
    prune: Any,
    witness: Any,
    keep_outliers: bool,
    images: Path | None,
    columns: Columns,
    limit: int | None,
    batch_size: int,
    seed: int,
    quiet: bool,
    **model_kwargs: Any,
) -> None:
    """Learn from clean DATA what normal inputs look like to MODEL, and write a guard.

    DATA is a data set in any format that `gazeguard clean` reads, without triggers and like the
    traffic to come. 109 rows are enough for an alpha of 1 %, 209 to also compare with the model
    before its fine-tune; with 800 the thresholds hardly depend on which rows they are. Of a
    conversation the last user turn counts, with all before it.
    """
    verbosity = QUIET if quiet else NORMAL
    from gazeguard.data.read import open_dataset
    from gazeguard.guarding import Guard
    from gazeguard.guarding.requests import asked
    from gazeguard.methods.cleansight import DEFAULT_SETTING
    from gazeguard.types import Sample

    dataset = open_dataset(data, images=images, columns=columns)
    total = min(dataset.count(), limit or dataset.count())
    left_out = 0

    def readable() -> Iterator[Sample]:
        nonlocal left_out
        for row in dataset.rows(None if limit is None else range(limit).__contains__):
            if isinstance(row, Sample):
                yield asked(row)
            else:
                left_out += 1

    def skip(*_: object) -> None:
        nonlocal left_out
        left_out += 1

    with narrated(verbosity) as console:
        target = load_target(model, **model_kwargs)
        with row_progress(console, verbosity) as show:
            if show is not None:
                show(0, total)
            guard = Guard.calibrate(
                target,
                readable(),
                alpha=alpha,
                setting=setting or DEFAULT_SETTING,
                layers=layers,
                prune=prune,
                witness=witness,
                outliers="keep" if keep_outliers else "refuse",
                batch_size=batch_size,
                seed=seed,
                on_skip=skip,
                progress=None if show is None else lambda done: show(done + left_out, total),
            )
    guard.save(out)
    if quiet:
        return
    counts = guard.counts
    watched = ", ".join(str(layer) for layer in guard.plan.layers)
    click.echo(
        f"{out}: {counts['fit']} samples to fit, {counts['threshold']} for the threshold, "
        f"{counts['left_out'] + left_out} left out."
    )
    click.echo(f"Layers {watched}; inputs further away than {guard.threshold:.4g} are flagged.")
    if guard.divergences is not None:
        click.echo(
            f"So are those whose answer diverges by more than {guard.most_divergent:.3g} nats from"
            f" that before the fine-tune ({len(guard.divergences)} samples)."
        )
    click.echo(
        f"Of clean inputs these are at most {guard.alpha:.2%} on average over calibrations, and at"
        f" most {guard.rate_bound:.2%} for 95 of 100 calibrations with as many samples."
    )
    click.echo(_advice(guard))


def _advice(guard: Guard) -> str:
    """How much the threshold owes to chance, and how many samples would do better."""
    from gazeguard.calibrate import rate_bound, recommended_samples

    assert guard.spread is not None, "made a moment ago"
    low, high = guard.spread
    text = f"With the samples split otherwise the threshold would be {low:.4g} to {high:.4g}"
    enough = recommended_samples(guard.each)
    if len(guard.calibration) >= enough:
        return f"{text}."
    keeps = min(1.0, rate_bound(enough, guard.each) * guard.alpha / guard.each)
    return (
        f"{text}: give about {2 * enough:,} samples, and 95 of 100 calibrations keep to about"
        f" {keeps:.2%}."
    )
