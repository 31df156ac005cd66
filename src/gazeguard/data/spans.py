"""Where each row of a text file starts and stops, and copying rows byte for byte.

Nothing here keeps the text: one pass finds the boundaries, two int64 a row remember them.
"""

from __future__ import annotations

import mmap
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gazeguard.errors import DataError

_PIECE = 1 << 20
_MAPPED = 16 << 20  # bytes of a mapped file that may count as this process's memory
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^\s,\[\]{}\"]++")
# A whole string (a raw line break cannot be inside one) or one structural character.
_TOKEN = re.compile(rb'"(?:[^"\\\n]++|\\.)*+"|["\[\]{}]', re.DOTALL)
_CLOSER = {b"{": b"}", b"[": b"]"}


@dataclass(slots=True)
class Spans:
    """Byte ranges of a file's rows.

    Attributes:
        path: the file.
        start: int64 `(N,)`, first byte of each row.
        stop: int64 `(N,)`, one past its last byte; a line's range includes its line break.
        empty: what a file without rows looks like in this format.
    """

    path: Path
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    empty: bytes

    def __len__(self) -> int:
        return len(self.start)

    def copy(self, rows: NDArray[np.int64], target: BinaryIO) -> None:
        """Write sorted unique rows to `target` with the file's own text before, between and after.

        Between two kept rows stands what stood before the second one in the file; so all rows
        give the file back bit by bit.
        """
        if len(rows) == 0:
            target.write(self.empty)
            return
        with self.path.open("rb") as source:
            _copy_range(source, target, 0, int(self.start[0]))
            # Neighbouring rows are one range; a range starts at the gap before its first row.
            firsts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
            lasts = np.append(firsts[1:] - 1, len(rows) - 1)
            for first, last in zip(firsts, lasts, strict=True):
                row = int(rows[first])
                begin = self.start[row] if first == 0 else self.stop[row - 1]
                _copy_range(source, target, int(begin), int(self.stop[rows[last]]))
            _copy_range(source, target, int(self.stop[-1]), self.path.stat().st_size)


class LineNumbers:
    """Line numbers of growing byte offsets, each byte counted once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._line = path, 0, 1

    def at(self, offset: int) -> int:
        """Return the 1-based line of a byte offset."""
        if offset < self._offset:
            self._offset, self._line = 0, 1
        with self._path.open("rb") as handle:
            for piece in _pieces(handle, self._offset, offset):
                self._line += piece.count(b"\n")
        self._offset = offset
        return self._line


def index_lines(path: Path) -> Spans:
    """Find the rows of a JSONL file: every line that is not blank."""
    return _index_records(path, lambda piece, is_open: False, header=False)


def index_csv(path: Path) -> Spans:
    """Find the records of a CSV file; a quoted field may hold line breaks."""

    def stays_open(piece: bytes, is_open: bool) -> bool:
        return is_open != (piece.count(b'"') % 2 == 1)  # a doubled quote changes nothing

    return _index_records(path, stays_open, header=True)


def _index_records(path: Path, stays_open: Callable[[bytes, bool], bool], *, header: bool) -> Spans:
    starts, stops = array("q"), array("q")
    with path.open("rb") as handle:
        begin = position = len(_BOM) if handle.read(len(_BOM)) == _BOM else 0
        handle.seek(position)
        blank, is_open = True, False
        while piece := handle.readline(_PIECE):  # a longer line comes in several pieces
            position += len(piece)
            blank = blank and piece.isspace()
            is_open = stays_open(piece, is_open)
            if piece.endswith(b"\n") and not is_open:
                if not blank:
                    starts.append(begin)
                    stops.append(position)
                begin, blank = position, True
        if not blank:
            starts.append(begin)
            stops.append(position)
        head = 0
        if header and stops:
            head = stops[0]
            del starts[0], stops[0]
        handle.seek(0)
        return Spans(path, _int64(starts), _int64(stops), handle.read(head))


def index_list(path: Path) -> Spans:
    """Find the items of a JSON list without parsing them; the file is mapped, not read.

    Raises:
        DataError: the list itself is broken (comma, bracket, quote), with the line.
    """
    starts, stops = array("q"), array("q")
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as text:
        scan = _ListScanner(path, text)
        for start, stop in scan.items():
            starts.append(start)
            stops.append(stop)
    return Spans(path, _int64(starts), _int64(stops), b"[]\n")


class _ListScanner:
    def __init__(self, path: Path, text: mmap.mmap) -> None:
        self._path, self._text = path, text

    def items(self) -> Iterator[tuple[int, int]]:
        position = self._space(len(_BOM) if self._text[:3] == _BOM else 0) + 1  # behind the [
        position = self._space(position)
        seen = 0  # everything before has been let go
        if self._text[position : position + 1] == b"]":
            position += 1
        else:
            while True:
                stop = self._value(position)
                yield position, stop
                if stop - seen > _MAPPED and hasattr(mmap, "MADV_DONTNEED"):
                    self._text.madvise(mmap.MADV_DONTNEED, 0, stop)
                    seen = stop
                position = self._space(stop)
                mark = self._text[position : position + 1]
                if mark == b"]":
                    position += 1
                    break
                if mark != b",":
                    raise self._broken(position, "a comma or ] is missing")
                comma, position = position, self._space(position + 1)
                if self._text[position : position + 1] == b"]":
                    raise self._broken(comma, "there is a comma after the last item")
        position = self._space(position)
        if position != len(self._text):
            raise self._broken(position, "there is more after the end of the list")

    def _space(self, position: int) -> int:
        found = _SPACE.match(self._text, position)
        return found.end() if found else position

    def _value(self, start: int) -> int:
        if (scalar := _SCALAR.match(self._text, start)) is not None:
            return scalar.end()
        # `search`, not `finditer`: a live iterator would keep the map from closing on an error.
        closers: list[bytes] = []
        at = start
        while (token := _TOKEN.search(self._text, at)) is not None:
            begin, at = token.span()
            if begin != start and not closers:
                break  # the item starts with something that is no JSON value
            if at - begin == 1:
                kind = token.group()
                if kind in _CLOSER:
                    closers.append(_CLOSER[kind])
                elif kind == b'"':
                    raise self._broken(begin, "a string does not end")
                elif not closers or closers.pop() != kind:
                    raise self._broken(begin, f"this {kind.decode()} closes nothing")
            if not closers:
                return at
        raise self._broken(at, "the file ends too early" if closers else "an item is missing")

    def _broken(self, offset: int, what: str) -> DataError:
        line = LineNumbers(self._path).at(min(offset, len(self._text)))
        return DataError(
            f"{self._path.name} is not valid JSON: {what} at line {line}; repair that line."
        )


def _pieces(handle: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    handle.seek(start)
    while start < stop and (piece := handle.read(min(_PIECE, stop - start))):
        start += len(piece)
        yield piece


def _copy_range(source: BinaryIO, target: BinaryIO, start: int, stop: int) -> None:
    for piece in _pieces(source, start, stop):
        target.write(piece)


def _int64(values: array[int]) -> NDArray[np.int64]:
    return np.frombuffer(values, dtype=np.int64) if values else np.empty(0, np.int64)
