"""Where each row of a text file starts and stops, and copying rows byte for byte.

Nothing here keeps the text: one pass finds the boundaries, two int64 a row remember them.
"""

from __future__ import annotations

import json
import mmap
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
        suffix: of a file in this format.
        header: the first line of a CSV file; empty in JSON.
    """

    path: Path
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    empty: bytes
    suffix: str = ".jsonl"
    header: bytes = b""

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
    """Places of growing byte offsets, each byte counted once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._line, self._begin = path, 0, 1, 0

    def at(self, offset: int) -> tuple[int, int]:
        """Return the 1-based line and column (in bytes) of a byte offset."""
        if offset < self._offset:
            self._offset, self._line, self._begin = 0, 1, 0
        with self._path.open("rb") as handle:
            for piece in _pieces(handle, self._offset, offset):
                self._line += piece.count(b"\n")
                if (last := piece.rfind(b"\n")) >= 0:
                    self._begin = self._offset + last + 1
                self._offset += len(piece)
        return self._line, offset - self._begin + 1


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
        first = handle.read(head)
        suffix = ".csv" if header else ".jsonl"
        return Spans(path, _int64(starts), _int64(stops), first, suffix, first)


def index_list(path: Path) -> Spans:
    """Find the items of a JSON list without parsing them; the file is mapped, not read.

    Raises:
        DataError: the list itself is broken (comma, bracket, quote), with the line.
    """
    with _scanning(path) as scan:
        start, stop = _spans(scan.items(scan.begin))
        scan.ends("list")
    return Spans(path, start, stop, b"[]\n", ".json")


def index_objects(path: Path) -> Spans:
    """Find objects that follow each other with any white space inside and between them.

    Raises:
        DataError: a bracket or quote is broken, with the line.
    """
    with _scanning(path) as scan:
        start, stop = _spans(scan.values())
    return Spans(path, start, stop, b"")


def index_wrapped(path: Path) -> dict[str, Spans]:
    """Find the lists of objects in a file that is one object, such as `{"data": [...]}`.

    What stands around the list's items is written before and after the kept ones.

    Raises:
        DataError: a comma, bracket or quote is broken, with the line.
    """
    found = {}
    with _scanning(path) as scan, path.open("rb") as handle:
        members = list(scan.members())
        scan.ends("object")
        for name, at in members:
            if scan.starts(at, b"["):
                start, stop = _spans(scan.items(at))
                if len(start) and scan.starts(int(start[0]), b"{"):
                    head = handle.read(int(start[0]))
                    handle.seek(int(stop[-1]))
                    found[name] = Spans(path, start, stop, head + handle.read(), ".json")
                    handle.seek(0)
    return found


@contextmanager
def _scanning(path: Path) -> Iterator[_Scanner]:
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as text:
        yield _Scanner(path, text)


def _spans(found: Iterable[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    starts, stops = array("q"), array("q")
    for start, stop in found:
        starts.append(start)
        stops.append(stop)
    return _int64(starts), _int64(stops)


class _Scanner:
    """Finds where JSON values start and stop in a mapped file."""

    def __init__(self, path: Path, text: mmap.mmap) -> None:
        self._path, self._text = path, text
        self.begin = self._space(len(_BOM) if text[:3] == _BOM else 0)
        self._end = self.begin

    def starts(self, position: int, mark: bytes) -> bool:
        """Whether this stands there."""
        return self._text[position : position + len(mark)] == mark

    def ends(self, what: str) -> None:
        """Check that nothing comes after the end of what was read last."""
        position = self._space(self._end)
        if position != len(self._text):
            raise self._broken(position, f"there is more after the end of the {what}")

    def values(self) -> Iterator[tuple[int, int]]:
        """Values that only white space parts."""
        position = self.begin
        while position < len(self._text):
            stop = self._value(position)
            yield position, stop
            position = self._space(stop)

    def items(self, start: int) -> Iterator[tuple[int, int]]:
        """The items of the list that starts there."""
        position = self._space(start + 1)
        seen = 0  # everything before has been let go
        if self.starts(position, b"]"):
            self._end = position + 1
            return
        while True:
            stop = self._value(position)
            yield position, stop
            if stop - seen > _MAPPED and hasattr(mmap, "MADV_DONTNEED"):
                self._text.madvise(mmap.MADV_DONTNEED, 0, stop)
                seen = stop
            position = self._after(stop, b"]")
            if position == self._end:
                return

    def members(self) -> Iterator[tuple[str, int]]:
        """The names in the file's one object, and where their values start."""
        position = self._space(self.begin + 1)
        if self.starts(position, b"}"):
            self._end = position + 1
            return
        while True:
            stop = self._value(position)
            colon = self._space(stop)
            if not self.starts(position, b'"') or not self.starts(colon, b":"):
                raise self._broken(position, "a name in quotes and a colon are missing")
            try:
                name = str(json.loads(self._text[position:stop]))
            except ValueError:
                raise self._broken(position, "a name cannot be read") from None
            start = self._space(colon + 1)
            yield name, start
            position = self._after(self._value(start), b"}")
            if position == self._end:
                return

    def _after(self, stop: int, closer: bytes) -> int:
        """Where the next item starts, or the end of what holds it."""
        position = self._space(stop)
        if self.starts(position, closer):
            self._end = position + 1
            return self._end
        if not self.starts(position, b","):
            self._no_comment(position)
            raise self._broken(position, f"a comma or {closer.decode()} is missing")
        comma, position = position, self._space(position + 1)
        if self.starts(position, closer):
            raise self._broken(comma, "there is a comma after the last item")
        return position

    def _no_comment(self, position: int) -> None:
        if any(self.starts(position, mark) for mark in (b"//", b"/*", b"#")):
            raise self._broken(position, "there is a comment, which JSON has not,")

    def _space(self, position: int) -> int:
        found = _SPACE.match(self._text, position)
        return found.end() if found else position

    def _value(self, start: int) -> int:
        if (scalar := _SCALAR.match(self._text, start)) is not None:
            self._no_comment(start)
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
        line, column = LineNumbers(self._path).at(min(offset, len(self._text)))
        return DataError(
            f"{self._path.name} is not valid JSON: {what} at line {line}, column {column}; repair"
            " that line."
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
