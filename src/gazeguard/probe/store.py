"""Measured rows on disk, in blocks: a run that was killed goes on where it was.

A block is a fixed range of input rows and one Parquet file, `rows-<start>-<stop>.<digest>.parquet`.
The digest is the SHA-256 of the file's own bytes, so a half-written or damaged block is noticed
without a second file. `run.json` names what the numbers depend on (model, data, options, version);
blocks measured under another identity are dropped. Blocks are measured independently of each
other, so which of them were already there changes nothing in the result.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gazeguard.errors import UsageError
from gazeguard.files import write_bytes

log = logging.getLogger(__name__)

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
        folder: where the blocks lie; made when missing.
        identity: what the numbers depend on, by the name a person is told when it changed,
            e.g. `{"model": "3f…", "data": "91…", "batch size": 8}`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        self.folder = folder
        self._identity = {name: json.dumps(identity[name], sort_keys=True) for name in identity}
        self._blocks: dict[tuple[int, int], Path] = {}

    def begin(self, *, resume: bool = True) -> list[str]:
        """Drop blocks of another identity (or all, without `resume`) and claim the folder.

        Returns:
            What changed since the blocks were measured, by its name in the identity; empty when
            they are still good or there were none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / "run.json"
        before = _read_marker(marker)
        blocks = _find_blocks(self.folder)
        changed = ["run.json"] if before is None else _differences(before, self._identity)
        changed = changed if blocks else []
        if not resume or before != self._identity:
            marker.unlink(missing_ok=True)  # first, so that no block is ever under a wrong marker
            for path in blocks.values():
                path.unlink(missing_ok=True)
            blocks = {}
            write_bytes(marker, json.dumps(self._identity, indent=1, sort_keys=True).encode())
        self._blocks = blocks
        for stray in self.folder.glob(".*"):
            if stray.is_file():  # temporary files of a killed run
                stray.unlink(missing_ok=True)
        return changed

    def read(self, start: int, stop: int) -> pa.Table | None:
        """The block of input rows `start` up to `stop`, or None when it has to be measured."""
        path = self._blocks.get((start, stop))
        if path is None:
            return None
        data = path.read_bytes()
        if _digest(data) != path.name.split(".")[1]:
            log.warning("Rows %d to %d are damaged on disk: measuring them again.", start, stop - 1)
            path.unlink()
            del self._blocks[start, stop]
            return None
        return pq.read_table(io.BytesIO(data))

    def write(self, start: int, stop: int, table: pa.Table) -> None:
        """Keep the block of input rows `start` up to `stop`.

        Raises:
            OSError: disk full, no permission; the blocks written before are whole.
        """
        data = parquet_bytes(table)
        path = self.folder / f"rows-{start:09d}-{stop:09d}.{_digest(data)}.parquet"
        write_bytes(path, data)
        self._blocks[start, stop] = path


def _find_blocks(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for path in folder.glob("rows-*.parquet"):
        match = _BLOCK.fullmatch(path.name)
        if match:
            found[int(match[1]), int(match[2])] = path
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _read_marker(path: Path) -> dict[str, str] | None:
    """The identity in `run.json`, or None when there is none that can be read."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
