"""What every data set offers, whatever its format, and the part all formats share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gazeguard.ahead import ahead
from gazeguard.data.columns import Columns
from gazeguard.data.conversation import Draft, content_id, place_images
from gazeguard.data.images import ImageRoot, image_name
from gazeguard.data.shapes import no_answer, parse
from gazeguard.data.survey import Survey
from gazeguard.data.write import check_output
from gazeguard.errors import RowError
from gazeguard.types import Sample, SkipKind, SkippedRow, TextOnlyRow, Turn

Wanted = Callable[[int], bool]
Record = Mapping[str, Any]
Row = Sample | SkippedRow | TextOnlyRow


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How rows become samples.

    Attributes:
        images: where referenced images lie, and the limits on them.
        columns: names that replace the usual ones.
        need_answer: rows without an answer are skipped.
        format: that the user named; `auto` reads every row by its own shape.
    """

    images: ImageRoot
    columns: Columns = field(default_factory=Columns)
    need_answer: bool = False
    format: str = "auto"


@dataclass(frozen=True, slots=True)
class Reading:
    """One row and how it was read.

    Attributes:
        found: what came of it.
        keys: its columns.
        ignored: those with a value that nothing was read from.
    """

    found: Row
    keys: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


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

    def readings(
        self, wanted: Wanted | None = None, within: range | None = None, threads: int = 0
    ) -> Iterator[Reading]:
        """Yield the same rows with how they were read."""

    def survey(self) -> Survey:
        """Return how many rows can be read, and why others cannot, without decoding images."""

    def fingerprint(self) -> str:
        """Return a hash that changes with the data, with any file it names, and with the limits."""

    def write(self, rows: Collection[int] | NDArray[np.int64], stem: Path) -> Path:
        """Write exactly these rows in the input's format and order; return what was written."""


def described(dataset: Dataset) -> str:
    """How a set's rows are read, in one or two lines."""
    return f"{dataset.path} ({dataset.format}): {dataset.survey().sentence()}"


class RecordDataset(ABC):
    """A data set whose rows are records (mappings) that are parsed into conversations.

    Args:
        path: the file or folder the user named.
        format: the name of what was found.
        options: of reading.
    """

    suffix = ""  # of what `write` makes; empty for folders

    def __init__(self, path: Path, format: str, options: ReadOptions) -> None:
        self.path = path
        self.format = format
        self._options = options
        self._images = options.images

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
        for reading in self.readings(wanted, within, threads):
            yield reading.found

    def readings(
        self, wanted: Wanted | None = None, within: range | None = None, threads: int = 0
    ) -> Iterator[Reading]:
        """Yield the same rows as `rows` with how they were read."""
        whole = range(self.count())
        asked = whole if within is None else whole[within.start : within.stop]
        records = self._records(wanted or _every, asked)
        yield from ahead(lambda numbered: self._read(*numbered), records, threads)

    def survey(self) -> Survey:
        """Return how many rows can be read, and why others cannot, without decoding images."""
        return self._pass[1]

    def fingerprint(self) -> str:
        """Return the SHA-256 of format, limits, columns, data files and files that rows refer to.

        A referenced image enters by name, size and modification time, so a million images cost
        a million `stat` calls and not a read.
        """
        return self._pass[0]

    @cached_property
    def _pass(self) -> tuple[str, Survey]:
        """One walk over all rows for both: reading a table of pictures twice would be long."""
        columns = self._options.columns
        digest = hashlib.sha256(f"{self.format}\0{self._images.limits}\0{columns}\0".encode())
        for path in self._files():
            with path.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        survey = Survey()
        for _, record in self._records(_every, range(self.count())):
            try:
                draft = self._draft(record)
                turns, sources = place_images(draft)
            except RowError as error:
                survey.skip(error.kind or SkipKind.BAD_ROW)
                continue
            missing = False
            for source in sources:
                identity = self._images.identity(source)
                digest.update(identity.encode(errors="surrogatepass") + b"\n")
                missing = missing or identity.endswith("\0absent")
            survey.ignore(draft.ignored)
            if missing:
                survey.skip(SkipKind.NO_IMAGE_FILE)
            elif sources and self._options.need_answer and not _answered(turns):
                survey.skip(SkipKind.NO_ANSWER)
            else:
                survey.read(len(sources), len(turns))
        return digest.hexdigest(), survey

    def absent_images(self, within: Iterable[range]) -> tuple[dict[str, str], bool]:
        """Return missing images of these rows with why, and whether any image is there."""
        missing: dict[str, str] = {}
        for part in within:
            for _, record in self._records(_every, part):
                try:
                    sources = place_images(self._draft(record))[1]
                except RowError:
                    continue
                for source in sources:
                    if isinstance(source, bytes) or not (why := self._images.absence(source)):
                        return missing, True
                    missing[source] = why
        return missing, False

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

    def _read(self, row: int, record: Record | RowError) -> Reading:
        keys = () if isinstance(record, RowError) else tuple(map(str, record))
        try:
            draft = self._draft(record)
            turns, sources = place_images(draft)
            if not sources:
                return Reading(TextOnlyRow(row), keys, draft.ignored)
            names = [image_name(source, place) for place, source in enumerate(sources)]
            encoded = self._images.read(sources, names)
            images = self._images.decode(encoded, names)
        except RowError as error:
            return Reading(SkippedRow(row, str(error), kind=error.kind or SkipKind.BAD_ROW), keys)
        sample_id = content_id(turns, encoded)
        if self._options.need_answer and not _answered(turns):
            assert not isinstance(record, RowError), "it was parsed"
            skipped = SkippedRow(row, no_answer(record), sample_id, SkipKind.NO_ANSWER)
            return Reading(skipped, keys, draft.ignored)
        return Reading(Sample(row, sample_id, images, turns, tuple(names)), keys, draft.ignored)

    def _draft(self, record: Record | RowError) -> Draft:
        if isinstance(record, RowError):
            raise record
        try:
            return self._parse(record)
        except RecursionError:
            raise RowError("this row is nested too deeply") from None

    def _parse(self, record: Record) -> Draft:
        return parse(record, self._options.columns, self._options.format)


def _answered(turns: Iterable[Turn]) -> bool:
    return any(turn.role == "assistant" and turn.text for turn in turns)


def _every(row: int) -> bool:
    return True
