"""Options that every verb with a model shares, and how they load it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from gazeguard.models.target import Target

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--adapter", metavar="PATH", help="LoRA adapter that was trained on MODEL."),
    click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda, cuda:<n>, mps or balanced."
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
    ),
    click.option("--revision", metavar="R", help="Commit, branch or tag of a hub model."),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run the model's own Python files. Read them first.",
    ),
)


def model_options(command: Command) -> Command:
    """Give a command the options of `load_target`."""
    for option in reversed(_OPTIONS):
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
    from gazeguard.cleaning.run import _device
    from gazeguard.models.load import load

    device_map, _ = _device(device)
    return load(model, adapter, revision, dtype, device_map, trust_remote_code)
