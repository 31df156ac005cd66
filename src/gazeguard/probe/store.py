"""Measured rows on disk, in blocks: a run that was killed goes on where it was.

A block is a fixed range of input rows and one Parquet file, `rows-<start>-<stop>.<digest>.parquet`.
The digest is the SHA-256 of the file's own bytes, so a half-written or damaged block is noticed
without a second file. `run.json` names what the numbers depend on (model, data, options, version);
blocks measured under another identity are dropped. Blocks are measured independently of each
other, so which of them were already there changes nothing in the result. The folder may be on this
machine or behind any URL that fsspec knows (`s3://bucket/folder`); it has one writer at a time.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gazeguard.ahead import ahead
from gazeguard.errors import UsageError
from gazeguard.probe.folder import Folder

log = logging.getLogger(__name__)

Span = tuple[int, int]

_MARKER = "run.json"
_NOTE = ".txt"
_READERS = 4  # blocks read at once
_BLOCK = re.compile(r"rows-(\d+)-(\d+)\.([0-9a-f]{16})\.parquet")


def parquet_bytes(table: pa.Table) -> bytes:
    """`table` as the bytes of a Parquet file; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of `folder` (made when missing) until this one ends or dies.

    Raises:
        UsageError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: two runs at once stay the user's business
        yield
        return
    with open(folder / "lock", "wb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another run is writing to {folder.parent}: wait for its end or choose another"
                " --out folder."
            ) from error
        except OSError as error:  # some network file systems have no locks
            log.debug("No lock on %s (%s).", folder, error)
        yield


class BlockStore:
    """Blocks of measured rows in `folder`, valid for one `identity`.

    Args:
        folder: a path or a URL; made when missing.
        identity: what the numbers depend on, by the name a person is told when it changed,
            e.g. `{"model": "3f…", "data": "91…", "batch size": 8}`.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, object]) -> None:
        self.folder = Folder(folder)
        self._identity = {name: json.dumps(identity[name], sort_keys=True) for name in identity}
        self._blocks: dict[Span, str] = {}

    def begin(self, *, resume: bool = True) -> list[str]:
        """Drop blocks of another identity (or all, without `resume`) and claim the folder.

        Returns:
            What changed since the blocks were measured, by its name in the identity; empty when
            they are still good or there were none.
        """
        before = self._read_marker()
        names = self.folder.names()
        blocks = _find_blocks(names)
        changed = [_MARKER] if before is None else _differences(before, self._identity)
        changed = changed if blocks else []
        if not resume or before != self._identity:
            if _MARKER in names:  # first, so that no block is ever under a wrong marker
                self.folder.remove(_MARKER)
            for name in [*blocks.values(), *(n for n in names if n.endswith(_NOTE))]:
                self.folder.remove(name)
            blocks = {}
            self.folder.write(
                _MARKER, json.dumps(self._identity, indent=1, sort_keys=True).encode()
            )
        self._blocks = blocks
        for name in names:
            if name.startswith("."):  # a temporary file of a killed run
                self.folder.remove(name)
        return changed

    def note(self, name: str, make: Callable[[], str]) -> str:
        """A word that belongs to the blocks; made and kept the first time."""
        file = name + _NOTE
        try:
            return self.folder.read(file).decode()
        except FileNotFoundError:
            word = make()
            self.folder.write(file, word.encode())
            return word

    def missing(self, spans: Sequence[Span]) -> list[Span]:
        """Those of `spans` that have to be measured; every other block is whole."""
        there = [span for span in spans if span in self._blocks]
        for span, found in zip(there, ahead(self._load, there, _READERS), strict=True):
            if found is None:
                name = self._blocks.pop(span)
                log.warning(
                    "Rows %d to %d are damaged on disk: measuring them again.",
                    span[0],
                    span[1] - 1,
                )
                self.folder.remove(name)
        return [span for span in spans if span not in self._blocks]

    def tables(self, spans: Sequence[Span]) -> Iterator[pa.Table]:
        """The blocks of `spans`, one after the other.

        Raises:
            OSError: a block is gone, or was damaged after `missing` had read it.
        """
        for span, data in zip(spans, ahead(self._load, spans, _READERS), strict=True):
            if data is None:
                raise OSError(
                    errno.EIO, "a block changed while it was read", self._blocks.get(span, "?")
                )
            yield pq.read_table(io.BytesIO(data))

    def write(self, start: int, stop: int, table: pa.Table) -> None:
        """Keep the block of input rows `start` up to `stop`.

        Raises:
            OSError: disk full, no permission; the blocks written before are whole.
        """
        data = parquet_bytes(table)
        name = f"rows-{start:09d}-{stop:09d}.{_digest(data)}.parquet"
        self.folder.write(name, data)
        self._blocks[start, stop] = name

    def _load(self, span: Span) -> bytes | None:
        """A block's bytes; None when they are not what its name says."""
        name = self._blocks.get(span)
        if name is None:
            return None
        try:
            data = self.folder.read(name)
        except FileNotFoundError:
            return None
        return data if _digest(data) == name.split(".")[1] else None

    def _read_marker(self) -> dict[str, str] | None:
        """The identity in `run.json`, or None when there is none that can be read."""
        try:
            content = json.loads(self.folder.read(_MARKER).decode("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def _find_blocks(names: Iterable[str]) -> dict[Span, str]:
    found = {}
    for name in names:
        if match := _BLOCK.fullmatch(name):
            found[int(match[1]), int(match[2])] = name
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
