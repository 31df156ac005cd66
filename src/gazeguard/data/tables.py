"""Data sets in Arrow tables: Parquet files, folders of them, and `datasets` folders."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gazeguard.data.columns import (
    IMAGE_COLUMNS,
    READ_COLUMNS,
    TEXT_COLUMNS,
    TURN_COLUMNS,
    UNREAD,
    Columns,
)
from gazeguard.data.conversation import Draft
from gazeguard.data.dataset import ReadOptions, Record, RecordDataset, Wanted
from gazeguard.data.images import shorten
from gazeguard.data.shapes import parse
from gazeguard.data.write import atomic_file, atomic_folder
from gazeguard.errors import DataError, RowError

_BATCH = 32  # rows in memory at once: images may be megabytes each
_GROUP_BYTES = 16 << 20  # held back before a row group is written; readers skip whole groups


class TablePart(ABC):
    """One file of a table: its schema, its rows in small batches, and a copy of some of them."""

    path: Path
    schema: Any
    count: int

    @abstractmethod
    def batches(
        self, columns: list[str] | None, any_wanted: Callable[[range], bool]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (first row, batch) in order; ranges without a wanted row may be left out."""

    @abstractmethod
    def write(self, rows: NDArray[np.int64], target: BinaryIO) -> None:
        """Write these rows with the same schema and metadata."""

    def _chosen(self, rows: NDArray[np.int64]) -> Iterator[Any]:
        for begin, batch in self.batches(None, lambda r: _meets(rows, r)):
            mask = np.isin(np.arange(begin, begin + batch.num_rows), rows)
            if mask.any():
                yield batch if mask.all() else batch.filter(pa.array(mask))


class ParquetPart(TablePart):
    """One Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _readable(path), self._open() as file:
            self.schema = file.schema_arrow
            self.count = file.metadata.num_rows

    def _open(self) -> Any:
        # Page by page: pre-buffering would hold a whole row group, images and all.
        return pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False)

    def batches(
        self, columns: list[str] | None, any_wanted: Callable[[range], bool]
    ) -> Iterator[tuple[int, Any]]:
        """Yield batches row group by row group; groups without a wanted row are not read."""
        begin = 0
        with _readable(self.path), self._open() as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if any_wanted(range(begin, begin + size)):
                    at = begin
                    for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
                        yield at, batch
                        at += batch.num_rows
                begin += size

    def write(self, rows: NDArray[np.int64], target: BinaryIO) -> None:
        """Write these rows with the input's schema, metadata and compression."""
        # Page sizes are looked at every `write_batch_size` rows; 1,024 images are too many.
        with pq.ParquetWriter(
            target, self.schema, compression=self._compression(), write_batch_size=_BATCH
        ) as writer:
            held: list[Any] = []
            size = 0
            for batch in self._chosen(rows):
                held.append(batch)
                size += batch.nbytes
                if size >= _GROUP_BYTES:
                    writer.write_table(pa.Table.from_batches(held, self.schema))
                    held, size = [], 0
            if held:
                writer.write_table(pa.Table.from_batches(held, self.schema))

    def _compression(self) -> dict[str, str] | str:
        with self._open() as file:
            if not file.num_row_groups:
                return "snappy"
            group = file.metadata.row_group(0)
            columns = [group.column(i) for i in range(group.num_columns)]
        names = {c.path_in_schema: c.compression.lower() for c in columns}
        return {path: "none" if c == "uncompressed" else c for path, c in names.items()}


class ArrowPart(TablePart):
    """One `data-*.arrow` stream of a folder made by `Dataset.save_to_disk`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _readable(path), pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_stream(source)
            self.schema = reader.schema
            self.count = sum(batch.num_rows for batch in reader)

    def batches(
        self, columns: list[str] | None, any_wanted: Callable[[range], bool]
    ) -> Iterator[tuple[int, Any]]:
        """Yield slices of the mapped file; ranges without a wanted row are not touched."""
        begin = 0
        with _readable(self.path), pa.memory_map(str(self.path)) as source:
            for whole in pa.ipc.open_stream(source):
                batch = whole if columns is None else whole.select(columns)
                for at in range(0, batch.num_rows, _BATCH):
                    piece = batch.slice(at, _BATCH)
                    if any_wanted(range(begin + at, begin + at + piece.num_rows)):
                        yield begin + at, piece
                begin += batch.num_rows

    def write(self, rows: NDArray[np.int64], target: BinaryIO) -> None:
        """Write these rows as one stream with the input's schema and metadata."""
        with pa.ipc.new_stream(target, self.schema) as writer:
            for batch in self._chosen(rows):
                writer.write_batch(batch)


class TableDataset(RecordDataset):
    """Rows in one or several Arrow tables with pictures.

    Args:
        path: the file or folder the user named.
        options: of reading.
        parts: the files, in row order.
    """

    def __init__(self, path: Path, options: ReadOptions, parts: Sequence[TablePart]) -> None:
        super().__init__(path, "parquet", options)
        self._parts = parts
        self.suffix = ".parquet" if path.is_file() else ""
        self._columns = [_pick_columns(part, options.columns) for part in parts]
        every = (name for images, _ in self._columns for name in images)
        self._image_columns = tuple(dict.fromkeys(every))
        self._begin = np.cumsum([0, *(part.count for part in parts)])

    def count(self) -> int:
        """Return the number of rows, unreadable ones too."""
        return int(self._begin[-1])

    def _records(self, wanted: Wanted, within: range) -> Iterator[tuple[int, Record | RowError]]:
        for part, first, (images, texts) in zip(
            self._parts, self._begin.tolist(), self._columns, strict=False
        ):

            def inside(rows: range, first: int = first) -> range:
                start, stop = first + rows.start, first + rows.stop
                return range(max(start, within.start), min(stop, within.stop))

            def any_wanted(rows: range) -> bool:
                return any(map(wanted, inside(rows)))

            if not inside(range(part.count)):
                continue
            read = list(dict.fromkeys([*images, *texts]))
            unread = {name: UNREAD for name in part.schema.names if name not in read}
            for begin, batch in part.batches(read, any_wanted):
                for row in filter(wanted, inside(range(begin, begin + batch.num_rows))):
                    record = batch.slice(row - first - begin, 1).to_pylist()[0]
                    yield row, record | unread

    def _parse(self, record: Record) -> Draft:
        return parse(record, self._options.columns, image_columns=self._image_columns)

    def _files(self) -> Sequence[Path]:
        return [part.path for part in self._parts]

    def _write(self, rows: NDArray[np.int64], target: Path) -> None:
        if self.path.is_file():
            with atomic_file(target) as handle:
                self._parts[0].write(rows, handle)
            return
        with atomic_folder(target) as folder:
            for part, begin in zip(self._parts, self._begin, strict=False):
                file = folder / part.path.relative_to(self.path)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as handle:
                    mine = rows[(rows >= begin) & (rows < begin + part.count)] - begin
                    part.write(mine, handle)
                    handle.flush()
                    os.fsync(handle.fileno())
            self._copy_state(rows, folder)

    def _copy_state(self, rows: NDArray[np.int64], folder: Path) -> None:
        """Copy what `datasets.load_from_disk` needs, under a new fingerprint.

        With the old one, `datasets` would take cached results of the whole set for this part.
        """
        info, state = self.path / "dataset_info.json", self.path / "state.json"
        if info.is_file():
            (folder / info.name).write_bytes(info.read_bytes())
        if state.is_file():
            content = json.loads(state.read_text(encoding="utf-8"))
            seed = f"{content.get('_fingerprint')}".encode() + rows.tobytes()
            content["_fingerprint"] = hashlib.sha256(seed).hexdigest()[:16]
            (folder / state.name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _pick_columns(part: TablePart, columns: Columns) -> tuple[list[str], list[str]]:
    """Return the image columns and the other columns of a table that rows are read from."""
    names = part.schema.names
    if missing := columns.missing(names):
        option, column = missing
        raise DataError(
            f"{part.path.name} has no column '{shorten(column)}' for {option}; it has"
            f" {_listed(names)}."
        )
    images = [columns.image] if columns.image else [n for n in IMAGE_COLUMNS if n in names][:1]
    images = images or [field.name for field in part.schema if _holds_images(field.type)]
    mapped = [name for name in (columns.prompt, columns.answer) if name is not None]
    texts = [*mapped, *(name for name in READ_COLUMNS if name in names)]
    turns = (part.schema.field(name).type for name in TURN_COLUMNS if name in names)
    if not images and not any("image" in str(kind) for kind in turns):
        raise DataError(
            f"{part.path.name} has no image column among {_listed(names)}; name it with --image."
        )
    if not any(name in (*mapped, *TEXT_COLUMNS) for name in texts):
        raise DataError(
            f"{part.path.name} has no text column among {_listed(names)}; name yours with"
            " --prompt and --answer."
        )
    return images, texts


def _listed(names: Sequence[str]) -> str:
    return shorten(", ".join(names), 200) or "none"


def _holds_images(kind: Any) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) and {f.name for f in kind} == {"bytes", "path"}


def _meets(rows: NDArray[np.int64], span: range) -> bool:
    at = int(np.searchsorted(rows, span.start))
    return at < len(rows) and bool(rows[at] < span.stop)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is broken ({str(error).splitlines()[0]}); download or export it again."
        ) from error
