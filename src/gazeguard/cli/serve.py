"""`gazeguard serve`: an OpenAI-compatible server under its guard."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gazeguard.cli import _errors
from gazeguard.cli._options import guard_option, load_target, mode_option, model_options
from gazeguard.cli._terminal import NORMAL, narrated

if TYPE_CHECKING:
    from gazeguard.guarding import Guard

_COUNT = click.IntRange(1)


@click.command(
    epilog="Exit codes: 0 stopped by SIGTERM or Ctrl-C, 2 error, 130 stopped by a second signal "
    "before all answers were complete."
)
@click.argument("model")
@guard_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 takes a free one.",
)
@click.option(
    "--api-key-file",
    "key_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keys that clients must send, one a line.",
)
@click.option("--name", help="What clients call the model.  [default: MODEL, its last part]")
@mode_option("refuses flagged requests")
@click.option(
    "--on-guard-error",
    type=click.Choice(["refuse", "pass"]),
    default="refuse",
    show_default=True,
    help="What to do with requests that should be judged and cannot.",
)
@click.option(
    "--verdict",
    "tell",
    type=click.Choice(["full", "outcome"]),
    default="full",
    show_default=True,
    help="What clients learn: scores and places help an attacker who may ask often.",
)
@click.option("--max-batch", default=8, show_default=True, type=_COUNT, metavar="N")
@click.option(
    "--max-wait-ms",
    "max_wait",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, 10_000),
    callback=lambda ctx, param, value: value / 1000,
    metavar="MS",
    help="How long a request waits for others to share its batch.",
)
@click.option(
    "--max-queue",
    default=64,
    show_default=True,
    type=click.IntRange(0),
    metavar="N",
    help="Requests that may wait; more get status 429.",
)
@click.option(
    "--timeout",
    default=120.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Seconds for a request, waiting included.",
)
@click.option(
    "--max-tokens",
    default=512,
    show_default=True,
    type=_COUNT,
    metavar="N",
    help="Longest answer; also the length where a request names none.",
)
@click.option("--max-images", default=8, show_default=True, type=click.IntRange(0), metavar="N")
@click.option(
    "--max-image-bytes",
    default=12 << 20,
    show_default=True,
    type=_COUNT,
    metavar="N",
    help="All images of a request together, encoded.",
)
@click.option(
    "--max-pixels",
    default=32 << 20,
    show_default=True,
    type=_COUNT,
    metavar="N",
    help="All images of a request together.",
)
@click.option(
    "--max-body-bytes",
    "max_body",
    default=16 << 20,
    show_default=True,
    type=_COUNT,
    metavar="N",
)
@click.option(
    "--max-prompt-chars", "max_chars", default=50_000, show_default=True, type=_COUNT, metavar="N"
)
@click.option(
    "--allow-remote-images",
    "hosts",
    metavar="HOST,...",
    help="Hosts to fetch images from; none without this option. https, unless http:// is given.",
)
@model_options
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    model: str,
    guard_folder: Path,
    host: str,
    port: int,
    key_file: Path | None,
    hosts: str | None,
    **given: Any,
) -> None:
    """Serve MODEL to OpenAI clients, every request judged by its guard.

    POST /v1/chat/completions, GET /v1/models, /health and /metrics; see docs/server.md.
    """
    from gazeguard.errors import MissingExtra

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtra(error.name or "fastapi", "server", "Serving") from error

    from gazeguard.server.remote import Origin
    from gazeguard.server.run import is_loopback
    from gazeguard.server.run import serve as run
    from gazeguard.server.settings import Settings, read_keys

    named = {field.name for field in fields(Settings)}
    chosen = {option: given.pop(option) for option in [*given] if option in named}
    chosen["name"] = chosen["name"] or _name(model)
    settings = Settings(
        **chosen,
        remote=tuple(Origin.of(one.strip()) for one in hosts.split(",")) if hosts else (),
        keys=read_keys(key_file) if key_file else (),
    )

    def load() -> Guard:
        from gazeguard.guarding import Guard

        return Guard.load(guard_folder, load_target(model, **given))

    def listening(address: str) -> None:
        click.echo(f"Serving {settings.name} under its guard at {address}/v1", err=True)
        if not settings.keys and not is_loopback(host):
            warning = "anybody who reaches this address can use the model: give --api-key-file"
            click.echo(f"Warning: {warning}.", err=True)

    with narrated(NORMAL):
        cut_short = run(load, settings, host, port, listening)
    ctx.exit(_errors.INTERRUPTED if cut_short else 0)


def _name(model: str) -> str:
    """A hub model's id; a folder's own name without the path to it."""
    folder = Path(model)
    return folder.resolve().name if folder.exists() else model
