"""Options that several verbs share, and how a verb loads the model that they name."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

if TYPE_CHECKING:
    from gazeguard.cluster import Ray
    from gazeguard.models.target import Target

Command = TypeVar("Command", bound=Callable[..., Any])

_FAIL_ON = ("flagged", "inconclusive")

adapter_option = click.option(
    "--adapter", metavar="PATH", help="LoRA adapter that was trained on MODEL."
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:<n>, mps, or balanced (all GPUs, then main memory, then disk).",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
)
revision_option = click.option(
    "--revision", metavar="R", help="Commit, branch or tag of a hub model."
)
remote_code_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run the model's own Python files. Read them first."
)
images_option = click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder that image paths in DATA are relative to.",
)
format_option = click.option(
    "--format",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="llava, chat, openai, columns, parquet or imagefolder; auto looks inside.",
)
guard_option = click.option(
    "--guard",
    "guard_folder",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="What `gazeguard calibrate` wrote for MODEL.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Show the libraries' own messages too."
)


def _roles(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """`human=Human` as the pair `("Human", "user")`."""
    from gazeguard.data.columns import ROLES

    pairs = []
    for text in value:
        role, _, written = text.partition("=")
        if role not in ROLES or not written:
            raise click.BadParameter(
                f"'{text}' is not ROLE=NAME with one of {', '.join(ROLES)} before the sign.",
                ctx,
                param,
            )
        pairs.append((written, ROLES[role]))
    return tuple(pairs)


role_option = click.option(
    "--role",
    "roles",
    multiple=True,
    callback=_roles,
    metavar="ROLE=NAME",
    help="How DATA writes a role, for example human=Human; repeat it for others.",
)


def column_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--prompt`, `--answer`, `--image` and `--role`, which a verb gets as `columns`."""

    @wraps(command)
    def with_columns(
        *args: Any,
        prompt_column: str | None,
        answer_column: str | None,
        image_column: str | None,
        roles: tuple[tuple[str, str], ...],
        **options: Any,
    ) -> Any:
        from gazeguard.data.columns import Columns

        columns = Columns(answer_column, prompt_column, image_column, roles)
        return command(*args, columns=columns, **options)

    found: Callable[..., Any] = role_option(with_columns)
    for name, what in (
        ("image", "pictures"),
        ("answer", "answers"),
        ("prompt", "questions, or lists of turns"),
    ):
        found = click.option(
            f"--{name}",
            f"{name}_column",
            metavar="COLUMN",
            help=f"Column of DATA with the {what}.  [default: the usual names]",
        )(found)
    return found


def ray_options(what: str) -> Callable[[Command], Command]:
    """`--ray` and its companions, which a verb hands to `chosen_ray`; `what` is spread."""

    def install(command: Command) -> Command:
        for option in (
            click.option(
                "--worker-gpus",
                type=click.FloatRange(0),
                metavar="N",
                help="Of a Ray worker.  [default: 1 if the cluster has any]",
            ),
            click.option(
                "--worker-cpus", type=click.IntRange(1), metavar="N", help="Of a Ray worker.  [1]"
            ),
            click.option(
                "--ray",
                "ray_address",
                is_flag=False,
                flag_value="",
                metavar="[ADDRESS]",
                help=f"Spread {what} over a Ray cluster; without ADDRESS over this machine's.",
            ),
        ):
            command = option(command)
        return command

    return install


def chosen_ray(
    address: str | None, workers: int | None, cpus: int | None, gpus: float | None
) -> Ray | None:
    """What the options of `ray_options` ask for.

    Raises:
        UsageError: they ask for workers of a cluster without `--ray`.
    """
    from gazeguard.cluster import Ray
    from gazeguard.errors import UsageError

    if address is None:
        if cpus is not None or gpus is not None:
            raise UsageError("--worker-cpus and --worker-gpus are of Ray workers: add --ray.")
        return None
    return Ray(address, workers, cpus or 1, gpus)


def mode_option(block: str) -> Callable[[Command], Command]:
    """`--mode` of a guard; `block` says what that mode does."""
    return click.option(
        "--mode",
        type=click.Choice(["purify", "detect", "block"]),
        default="purify",
        show_default=True,
        help=f"purify answers as if the trigger were not there; block {block}.",
    )


def fail_on_option(note: str = "") -> Callable[[Command], Command]:
    """`--fail-on`, which a verb gets as the set of outcomes that do not exit 0."""
    return click.option(
        "--fail-on",
        callback=_fail_on,
        metavar="OUTCOMES",
        default="flagged,inconclusive",
        show_default=True,
        help=f"Outcomes that do not exit 0; never for none.{note}",
    )


def batch_size_of(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> int | Literal["auto"] | None:
    """A callback: a number of rows, or `auto`."""
    if value is None:
        return None
    if value == "auto":
        return "auto"
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"'{value}' is neither auto nor 1 or more.", ctx, param)
    return int(value)


def _fail_on(ctx: click.Context, param: click.Parameter, value: str) -> frozenset[str]:
    """Outcomes that end in an exit code other than 0."""
    named = frozenset(word.strip() for word in value.split(","))
    if named == {"never"}:
        return frozenset()
    if not named <= {*_FAIL_ON}:
        raise click.BadParameter(
            f"'{value}' is neither never nor a list of {', '.join(_FAIL_ON)}.", ctx, param
        )
    return named


def model_options(command: Command) -> Command:
    """Give a command the options of `load_target`."""
    for option in (
        remote_code_option,
        revision_option,
        dtype_option,
        device_option,
        adapter_option,
    ):
        command = option(command)
    return command


def load_target(
    model: str,
    adapter: str | None,
    device: str,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
) -> Target:
    """Load the model that the options name."""
    from gazeguard.models.device import chosen_device
    from gazeguard.models.load import load

    device_map, _ = chosen_device(device)
    return load(model, adapter, revision, dtype, device_map, trust_remote_code)
