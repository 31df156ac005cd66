"""Report files are text, and a failed write is the user's to mend."""

from __future__ import annotations

from pathlib import Path

from gazeguard.errors import UsageError
from gazeguard.files import write_bytes


def write_atomic(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, whole or not at all.

    Characters UTF-8 cannot hold (lone surrogates of broken input) become `?`.

    Raises:
        UsageError: the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UsageError(
            f"Cannot write {path} ({error.strerror or error}): free some space or choose another "
            "output folder."
        ) from error
    return path
