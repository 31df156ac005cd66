"""Files and folders that appear whole or not at all, and never on top of the input."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gazeguard.errors import UsageError


def check_output(source: Path, target: Path) -> None:
    """Refuse a target that would overwrite the input or become a part of it.

    Raises:
        UsageError: the target is the input, holds it, or lies inside an input folder.
    """
    inside, outside = target.resolve(), source.resolve()
    if inside == outside or inside in outside.parents or outside in inside.parents:
        raise UsageError(
            f"{target} would overwrite or mix with the input {source}; choose another --out folder."
        )


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when complete and on disk.

    A killed run leaves at most one `.NAME.partial`, which the next run replaces.

    Raises:
        UsageError: the folder cannot be written, or the disk is full.
    """
    partial = target.with_name(f".{target.name}.partial")
    with _say_what_failed(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill that takes its name, and the place of an older one, when complete.

    Raises:
        UsageError: the folder cannot be written, or the disk is full.
    """
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    with _say_what_failed(target):
        _remove(partial)
        try:
            partial.mkdir(parents=True)
            yield partial
            # A folder cannot be renamed onto a full one: for a moment the old one steps aside.
            _remove(old)
            if target.exists():
                target.rename(old)
            partial.rename(target)
        finally:
            _remove(partial)
        _remove(old)


@contextmanager
def _say_what_failed(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise UsageError(
            f"{target} could not be written ({why}); make room or choose another --out folder."
        ) from error


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
