"""Writing files and folders so that a reader sees the old or the whole new, never a part."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to fill; `path` holds its old content or all of the new, at any moment.

    Raises:
        OSError: disk full, no permission; `path` is as it was and no temporary file stays.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files only their owner may read
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write() does not say where
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` as `writing` does, and raise as it does."""
    with writing(path) as stream:
        stream.write(data)


def write_json(path: Path, content: Any) -> None:
    """Write what JSON can hold, indented, as `write_bytes` does."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that bears its name only once it is complete; replaces what was there.

    Left by an error, it stays as `NAME.part` until the next try removes it.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
