"""What every data set offers, whatever its format, and the part all formats share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gazeguard.ahead import ahead
from gazeguard.data.conversation import Draft, content_id, place_images
from gazeguard.data.images import ImageRoot, shorten
from gazeguard.data.write import check_output
from gazeguard.errors import RowError
from gazeguard.types import Sample, SkipKind, SkippedRow, TextOnlyRow

Wanted = Callable[[int], bool]
Record = Mapping[str, Any]
Row = Sample | SkippedRow | TextOnlyRow


class Dataset(Protocol):
    """A data set on disk that can be read row by row and written back in its own format."""

    format: str
    path: Path
    suffix: str

    def count(self) -> int:
        """Return the number of rows, unreadable ones too, without decoding images."""

    def rows(
        self, wanted: Wanted | None = None, within: range | None = None, threads: int = 0
    ) -> Iterator[Row]:
        """Yield every wanted row once, in input order; others are passed over undecoded.

        Rows outside of `within` are not even asked about; `threads` decode ahead.
        """

    def fingerprint(self) -> str:
        """Return a hash that changes with the data, with any file it names, and with the limits."""

    def write(self, rows: Collection[int] | NDArray[np.int64], stem: Path) -> Path:
        """Write exactly these rows in the input's format and order; return what was written."""


class RecordDataset(ABC):
    """A data set whose rows are records (mappings) that a parser turns into conversations.

    Args:
        path: the file or folder the user named.
        format: the format's name.
        parse: from a record to a draft conversation.
        images: where referenced images lie, and the limits on them.
        need_answer: rows without an answer are skipped.
    """

    suffix = ""  # of what `write` makes; empty for folders

    def __init__(
        self,
        path: Path,
        format: str,
        parse: Callable[[Record], Draft],
        images: ImageRoot,
        need_answer: bool = False,
    ) -> None:
        self.path = path
        self.format = format
        self._parse = parse
        self._images = images
        self._need_answer = need_answer

    @abstractmethod
    def count(self) -> int:
        """Return the number of rows, unreadable ones too."""

    @abstractmethod
    def _records(self, wanted: Wanted, within: range) -> Iterator[tuple[int, Record | RowError]]:
        """Yield the wanted rows, parsed, or the error that says why a row has no record.

        `wanted` is asked about rows in `within` alone, which is a part of the set.
        """

    @abstractmethod
    def _files(self) -> Sequence[Path]:
        """Return the files that hold the rows, in order."""

    @abstractmethod
    def _write(self, rows: NDArray[np.int64], target: Path) -> None:
        """Write sorted unique rows to `target`, whole or not at all."""

    def rows(
        self, wanted: Wanted | None = None, within: range | None = None, threads: int = 0
    ) -> Iterator[Row]:
        """Yield every wanted row once, in input order; others are passed over undecoded.

        Args:
            wanted: says which; all when None.
            within: rows outside of this range are not even asked about.
            threads: that decode the next rows while one is used; 0 for none.
        """
        whole = range(self.count())
        asked = whole if within is None else whole[within.start : within.stop]
        records = self._records(wanted or _every, asked)
        yield from ahead(lambda numbered: self._read(*numbered), records, threads)

    def fingerprint(self) -> str:
        """Return the SHA-256 of format, limits, data files and the files that rows refer to.

        A referenced image enters by name, size and modification time, so a million images cost
        a million `stat` calls and not a read.
        """
        digest = hashlib.sha256(f"{self.format}\0{self._images.limits}\0".encode())
        for path in self._files():
            with path.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        for _, record in self._records(_every, range(self.count())):
            try:
                sources = place_images(self._draft(record))[1]
            except RowError:
                continue
            for source in sources:
                identity = self._images.identity(source)
                digest.update(identity.encode(errors="surrogatepass") + b"\n")
        return digest.hexdigest()

    def write(self, rows: Collection[int] | NDArray[np.int64], stem: Path) -> Path:
        """Write exactly these rows in the input's format and order; return what was written.

        Args:
            rows: row indices in any order; unreadable rows can be among them.
            stem: the target without the format's suffix, for example `out/kept`.

        Raises:
            UsageError: the target is the input, or cannot be written.
        """
        chosen = np.unique(np.fromiter(rows, dtype=np.int64, count=len(rows)))
        if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < self.count():
            raise IndexError(f"rows must be in 0..{self.count() - 1}")
        target = stem.with_name(stem.name + self.suffix)
        check_output(self.path, target)
        self._write(chosen, target)
        return target

    def _read(self, row: int, record: Record | RowError) -> Row:
        try:
            turns, sources = place_images(self._draft(record))
            if not sources:
                return TextOnlyRow(row)
            encoded = self._images.read(sources)
            images = self._images.decode(encoded)
        except RowError as error:
            return SkippedRow(row, str(error), kind=error.kind or SkipKind.BAD_ROW)
        sample = Sample(row, content_id(turns, encoded), images, turns)
        if self._need_answer and not any(t.role == "assistant" and t.text for t in turns):
            why = f"no answer in this row (keys: {_keys(record)})"
            return SkippedRow(row, why, sample.sample_id, SkipKind.NO_ANSWER)
        return sample

    def _draft(self, record: Record | RowError) -> Draft:
        if isinstance(record, RowError):
            raise record
        return self._parse(record)


def _keys(record: Record | RowError) -> str:
    return shorten(", ".join(map(str, record))) if isinstance(record, Mapping) else ""


def _every(row: int) -> bool:
    return True
