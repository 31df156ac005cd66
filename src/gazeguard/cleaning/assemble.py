"""From measured blocks to one `Profile` that lies on disk: only what is looked at is in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gazeguard.cleaning.measure import BEFORE, SCHEMA, SIGNALS
from gazeguard.types import Profile, SkipKind, SkippedRow

_NUMBERS = ("row", "turn", "image_tokens")
_TEXTS = ("sample_id", "prompt", "answer")
_TEXT_ROWS = 4096  # of one batch of the file of texts


class Texts(Sequence[str]):
    """A column of words in a mapped file, read like a list."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            yield from chunk.to_pylist()

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            found: list[str] = self._column.slice(start, max(0, stop - start)).to_pylist()
            return found if step == 1 else [self[i] for i in range(start, stop, step)]
        text: str = self._column[place].as_py()
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def assemble(
    blocks: Iterable[pa.Table], layers: tuple[int, ...], folder: Path
) -> tuple[Profile, list[SkippedRow], NDArray[np.int64]]:
    """Join blocks, in their order, into what a method may see.

    Args:
        blocks: of `measure`; one is in memory at a time.
        layers: decoder layer indices.
        folder: gets the arrays as raw files that the profile maps; it is emptied first.

    Returns:
        The measured answers, rows that could not be with the reason, and the rows of text alone.

    Raises:
        OSError: disk full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = [*SIGNALS, *(BEFORE + name for name in SIGNALS)]
    failed: list[SkippedRow] = []
    text_only = [np.zeros(0, np.int64)]
    rows, full = 0, dict.fromkeys(names, True)
    with ExitStack() as open_files:
        numbers = {
            name: open_files.enter_context((folder / name).open("wb"))
            for name in (*_NUMBERS, *names)
        }
        texts = open_files.enter_context(_TextFile(folder / "texts"))
        for block in blocks:
            failed += _failed(block)
            text_only.append(block["row"].filter(_is_text(block)).to_numpy())
            good = block.filter(pc.is_null(block["reason"]))
            if not good.num_rows:
                continue
            rows += good.num_rows
            for name in _NUMBERS:
                _append(numbers[name], good[name].to_numpy())
            for name in names:
                full[name] &= good[name].null_count == 0
                if full[name]:
                    values = good[name].combine_chunks().flatten()
                    _append(numbers[name], np.asarray(values, np.float32))
            texts.add(good.select(_TEXTS))
    words = _mapped_texts(folder / "texts")
    columns: dict[str, Any] = {name: Texts(words[name]) for name in _TEXTS}
    columns |= {n: _mapped(folder / n, np.dtype(np.int64), (rows,)) for n in _NUMBERS}
    signals = {n: _signal(folder / n, rows, len(layers)) for n in names if full[n] and rows}
    none = np.zeros((0, len(layers)), np.float32)
    before = {name: signals.get(BEFORE + name) for name in SIGNALS}
    profile = Profile(
        **columns,
        layers=layers,
        signals={name: signals.get(name, none) for name in SIGNALS},
        before=None
        if any(values is None for values in before.values())
        else {name: values for name, values in before.items() if values is not None},
    )
    return profile, failed, np.concatenate(text_only)


def _failed(block: pa.Table) -> list[SkippedRow]:
    bad = block.select(["row", "reason", "sample_id", "kind"]).filter(pc.is_valid(block["kind"]))
    return [SkippedRow(**r | {"kind": SkipKind[r["kind"]]}) for r in bad.to_pylist()]


def _is_text(block: pa.Table) -> pa.ChunkedArray:
    return pc.and_(pc.is_valid(block["reason"]), pc.is_null(block["kind"]))


def _append(file: BinaryIO, values: NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(values).tobytes())


def _signal(path: Path, rows: int, layers: int) -> NDArray[np.float32]:
    """`(rows, layers)`, or `(rows, layers, heads)` where rows hold a value for every head."""
    heads = path.stat().st_size // (4 * rows * layers)
    shape = (rows, layers) if heads == 1 else (rows, layers, heads)
    return _mapped(path, np.dtype(np.float32), shape)


def _mapped(path: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A raw file as a read-only array; an empty file cannot be mapped."""
    if not np.prod(shape):
        return np.zeros(shape, kind)
    return np.asarray(np.memmap(path, kind, "r", shape=shape))


class _TextFile:
    """An Arrow file of `_TEXTS`, in batches that are quick to look into."""

    def __init__(self, path: Path) -> None:
        self._schema = pa.schema([SCHEMA.field(name) for name in _TEXTS])
        self._writer = pa.ipc.new_file(str(path), self._schema)
        self._held: list[pa.Table] = []

    def __enter__(self) -> _TextFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, rows: pa.Table) -> None:
        self._held.append(rows)
        if sum(table.num_rows for table in self._held) >= _TEXT_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.concat_tables(self._held).combine_chunks())
            self._held = []


def _mapped_texts(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
