"""Exit codes (`docs/exit-codes.md`) and the sentence a failure is told in."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from gazeguard.errors import GazeguardError, MeasurementError

if TYPE_CHECKING:
    from gazeguard.types import Outcome  # at run time it would bring numpy into `--help`

CLEAN, FLAGGED, USAGE, INCONCLUSIVE, INTERRUPTED = 0, 1, 2, 3, 130

_CURES = {
    errno.ENOSPC: "free some space and run the same command again; what was measured is kept",
    errno.EDQUOT: "make room in your quota and run the same command again; what was measured is "
    "kept",
    errno.EACCES: "check its rights or choose another path",
    errno.EPERM: "check its rights or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EPIPE: "let the program that reads this output run to its end",
    errno.EMFILE: "raise the limit of open files with `ulimit -n`",
    errno.EIO: "check the disk and run the same command again",
}


def outcome_code(outcome: Outcome, fail_on: frozenset[str]) -> int:
    """The exit code of a finished run; an outcome outside of `fail_on` exits 0."""
    if outcome not in fail_on:
        return CLEAN
    return FLAGGED if outcome == "flagged" else INCONCLUSIVE


def exit_code(error: GazeguardError | OSError) -> int:
    """The exit code of a run that could not finish."""
    return INCONCLUSIVE if isinstance(error, MeasurementError) else USAGE


def sentence(error: GazeguardError | OSError) -> str:
    """The error as one sentence with its cure, on one line."""
    if isinstance(error, GazeguardError):
        return " ".join(str(error).split())
    what = os.strerror(error.errno) if error.errno else " ".join(str(error).split()).rstrip(".")
    where = f" ({error.filename})" if error.filename else ""
    cure = _CURES.get(error.errno or 0, "run the same command again; what was measured is kept")
    return f"{what}{where}: {cure}."
