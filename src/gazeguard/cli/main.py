"""The `gazeguard` command: puts the verbs together and turns errors into exit codes.

A verb's module is imported when it is used, so `--help` and `--version` stay fast.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from gazeguard._version import __version__
from gazeguard.cli import _errors
from gazeguard.errors import GazeguardError

# Verb -> the line `--help` shows; the module `cli.<verb>` has a click command of that name.
VERBS = {
    "bench": "Run attacks against defences and draw the tables.",
    "calibrate": "Learn what clean inputs look like to a model, for its guard.",
    "clean": "Find the poisoned rows of a fine-tuning set and write the clean set.",
    "demo": "Run the main job on the shipped model and a set poisoned here.",
    "doctor": "Show what this machine offers and what is missing.",
    "guard": "Ask a model under its guard: judged, and disarmed when a trigger is active.",
    "inspect": "Show how the rows of a data set will be read, before a model runs.",
    "lab": "Make tiny models, poisoned sets and fine-tunes with the truth known.",
    "scan": "Say whether somebody planted a backdoor in a model, an adapter or a text encoder.",
    "serve": "Serve a model to OpenAI clients, every request judged by its guard.",
}


class _Verbs(click.Group):
    """A group that knows its commands by name and imports them on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = getattr(import_module(f"gazeguard.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command), f"cli/{cmd_name}.py lacks its command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.command(
    cls=_Verbs,
    context_settings={"auto_envvar_prefix": "GAZEGUARD", "help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 clean, 1 flagged, 2 usage or environment error, 3 inconclusive, "
    "130 interrupted.",
)
@click.version_option(__version__, prog_name="gazeguard", message="%(prog)s %(version)s")
def cli() -> None:
    """Find, clean and disarm backdoors in vision-language models by watching where they look."""


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; mistakes become one sentence on stderr."""
    try:
        code = cli.main(args, prog_name="gazeguard", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return _errors.USAGE
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return _errors.INTERRUPTED
    except SystemExit:  # click's end when nobody reads stdout any more, with the code for "flagged"
        click.echo(f"Error: {_errors.sentence(BrokenPipeError(errno.EPIPE, ''))}", err=True)
        return _errors.USAGE
    except (GazeguardError, OSError) as error:
        if os.environ.get("GAZEGUARD_DEBUG"):
            raise
        click.echo(f"Error: {_errors.sentence(error)}", err=True)
        return _errors.exit_code(error)
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """Entry point of the console script.

    A bug keeps its traceback but not Python's exit code 1, which means "flagged" here.
    """
    try:
        sys.exit(run())
    except Exception:
        import traceback

        traceback.print_exc()
        sys.exit(_errors.USAGE)
