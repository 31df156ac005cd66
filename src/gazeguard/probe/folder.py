"""A folder of small files on this machine or behind any URL that fsspec knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gazeguard.errors import UsageError
from gazeguard.files import write_bytes


class Folder:
    """Files that are read and written whole.

    On this machine a file is whole or not there. Elsewhere that is so for object stores; on other
    remote file systems a cut transfer may leave a part of one, so a reader checks what it gets.

    Args:
        where: a path or a URL such as `s3://bucket/folder`; made when missing.

    Raises:
        UsageError: no such protocol, or its package is not installed.
    """

    def __init__(self, where: Path | str) -> None:
        try:
            self._fs, self._path = fsspec.url_to_fs(str(where))
        except (ValueError, ImportError) as error:
            raise UsageError(
                f"{where} cannot be opened ({str(error).rstrip('.')}): give a path or a URL that"
                " fsspec knows, and install what it asks for."
            ) from error
        self._local = Path(self._path) if isinstance(self._fs, LocalFileSystem) else None
        self._fs.makedirs(self._path, exist_ok=True)

    def names(self) -> list[str]:
        """All files, sorted."""
        found: list[dict[str, Any]] = self._fs.ls(self._path, detail=True, refresh=True)
        return sorted(
            str(entry["name"]).rpartition("/")[2] for entry in found if entry["type"] == "file"
        )

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        data: bytes = self._fs.cat_file(f"{self._path}/{name}")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file.

        Raises:
            OSError: disk full, no permission.
        """
        if self._local is not None:
            write_bytes(self._local / name, data)
        else:
            self._fs.pipe_file(f"{self._path}/{name}", data)

    def remove(self, name: str) -> None:
        """Remove a file that is there."""
        self._fs.rm_file(f"{self._path}/{name}")
