"""Writing a report file so that a reader sees the old one or the whole new one, never a part."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from gazeguard.errors import UsageError


def write_atomic(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path` by way of a temporary file in the same folder.

    Characters UTF-8 cannot hold (lone surrogates of broken input) become `?`.

    Raises:
        UsageError: the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(text.encode("utf-8", errors="replace"))
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes private files; a report is as readable as its folder's other files.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"Cannot write {path} ({error.strerror or error}): free some space or choose another "
            "output folder."
        ) from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    return path
