"""Data sets whose rows are pieces of a text file: JSON lists, JSONL, and image folders."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gazeguard.data.conversation import Draft
from gazeguard.data.dataset import ReadOptions, Record, RecordDataset, Wanted
from gazeguard.data.images import shorten
from gazeguard.data.shapes import parse
from gazeguard.data.spans import LineNumbers, Spans
from gazeguard.data.write import atomic_file, atomic_folder
from gazeguard.errors import RowError

_NAMES = ("file_name", "file_names")
csv.field_size_limit(1 << 30)  # pictures in cells are longer; a row has a limit of its own
METADATA = ("metadata.jsonl", "metadata.csv")


class RowText:
    """Reads single rows of a spanned text file as records.

    Args:
        spans: where the rows are.
        max_bytes: longest row that is parsed; a longer one is a `RowError`.
    """

    def __init__(self, spans: Spans, max_bytes: int) -> None:
        self.spans = spans
        self._max_bytes = max_bytes
        self._lines = LineNumbers(spans.path)
        self._header = spans.header.decode("utf-8-sig", "replace") if spans.header else None

    def record(self, handle: BinaryIO, row: int) -> Record | RowError:
        """Return one row, or the error that says why it has no record."""
        start, stop = int(self.spans.start[row]), int(self.spans.stop[row])
        if stop - start > self._max_bytes:
            return RowError(f"row is longer than the limit of {self._max_bytes:,} bytes")
        handle.seek(start)
        raw = handle.read(stop - start)
        try:
            text = raw.decode("utf-8")
            value = json.loads(text) if self._header is None else _csv_row(self._header, text)
        except json.JSONDecodeError as error:
            line, column = self._lines.at(start)
            column = error.colno + (column - 1 if error.lineno == 1 else 0)
            return RowError(
                f"line {line + error.lineno - 1}, column {column} is not JSON: {error.msg}"
            )
        except UnicodeDecodeError:
            return RowError(f"{self._at(start)} is not UTF-8 text; save the file as UTF-8")
        except (ValueError, csv.Error) as error:  # for example a number of 5,000 digits
            return RowError(f"{self._at(start)} cannot be read: {error}")
        except RecursionError:
            return RowError(f"{self._at(start)} is nested too deeply")
        if not isinstance(value, dict):
            return RowError(f"{self._at(start)} is not an object")
        return value

    def _at(self, offset: int) -> str:
        return f"line {self._lines.at(offset)[0]}"


class TextDataset(RecordDataset):
    """Rows in a JSON list, JSON objects that follow each other, or the lines of a CSV file.

    Args:
        path: the file.
        format: the name of what was found.
        options: of reading.
        spans: where the rows are.
    """

    def __init__(self, path: Path, format: str, options: ReadOptions, spans: Spans) -> None:
        super().__init__(path, format, options)
        self.suffix = spans.suffix
        self._text = RowText(spans, options.images.limits.max_row_bytes)

    def count(self) -> int:
        """Return the number of rows, unreadable ones too."""
        return len(self._text.spans)

    def _records(self, wanted: Wanted, within: range) -> Iterator[tuple[int, Record | RowError]]:
        with self._text.spans.path.open("rb") as handle:
            for row in within:
                if wanted(row):
                    yield row, self._text.record(handle, row)

    def _files(self) -> Sequence[Path]:
        return [self._text.spans.path]

    def _write(self, rows: NDArray[np.int64], target: Path) -> None:
        with atomic_file(target) as handle:
            self._text.spans.copy(rows, handle)


class ImageFolder(TextDataset):
    """A folder of images with `metadata.jsonl` or `metadata.csv` (`file_name` + text columns)."""

    def __init__(self, path: Path, options: ReadOptions, spans: Spans) -> None:
        super().__init__(path, "imagefolder", options, spans)
        self.suffix = ""
        self._names = (options.columns.image,) if options.columns.image else _NAMES

    def _write(self, rows: NDArray[np.int64], target: Path) -> None:
        """Write the metadata lines as they are, and the images they name as hard links.

        A hard link costs no space; where the file system has none, the image is copied.
        """
        metadata = self._text.spans.path
        with atomic_folder(target) as folder:
            with (folder / metadata.name).open("wb") as handle:
                self._text.spans.copy(rows, handle)
                handle.flush()
                os.fsync(handle.fileno())
            with metadata.open("rb") as source:
                for row in rows:
                    self._link_images(self._text.record(source, int(row)), folder)

    def _parse(self, record: Record) -> Draft:
        _file_names(record, self._names)  # checks that no name leaves the folder
        return parse(record, self._options.columns, image_columns=self._names)

    def _link_images(self, record: Record | RowError, folder: Path) -> None:
        if isinstance(record, RowError):
            return
        try:
            names = _file_names(record, self._names)
        except RowError:
            return  # the row names nothing that could be copied; its line is kept
        for name in names:
            try:
                image = self._images.locate(name)
            except RowError:
                continue
            link = folder / name
            # Never replace: a row may name `metadata.jsonl` itself, or share another's image.
            if not image.is_file() or os.path.lexists(link):
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.hardlink_to(image)
            except OSError:
                shutil.copy2(image, link)


def _file_names(record: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    value: Any = next((record[column] for column in columns if record.get(column)), [])
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise RowError(f"'{columns[0]}' is not text")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise RowError(f"image path leaves the image folder: {shorten(name)}")
    return names


def csv_names(header: str) -> list[str]:
    """The column names in the first line of a CSV or TSV file."""
    return next(csv.reader([header], delimiter=_delimiter(header)), [])


def _delimiter(header: str) -> str:
    return "\t" if header.count("\t") > header.count(",") else ","


def _csv_row(header: str, text: str) -> dict[str, Any]:
    lines = io.StringIO(header + text, newline="")
    row = next(csv.DictReader(lines, strict=True, delimiter=_delimiter(header)), {})
    return {key: value or None for key, value in row.items() if key is not None}
