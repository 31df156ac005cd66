"""Sets of any size, as Parquet files with the pictures inside."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gazeguard.lab.poison import make_set

TRIGGER, RATE, SEED = "badnet-center", 0.1, 77
_GROUP = 500  # rows of a row group: what a worker has to read to get at one of them
_PICTURES = 500  # different ones in a set of small pictures
_SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()),
        ("answer", pa.string()),
    ]
)


def lab_set(path: Path, rows: int) -> Path:
    """The lab's captions, one in ten poisoned with the trigger of the shipped adapter."""
    made = make_set("captions", rows, TRIGGER, RATE, SEED)
    return _write(path, ((_png(row.pixels), row.question, row.answer) for row in made))


def small_set(path: Path, rows: int) -> Path:
    """Small pictures and numbered questions: no two rows are equal, and reading costs little."""
    rng = np.random.default_rng(SEED)
    pictures = [_png(rng.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(_PICTURES)]
    return _write(
        path,
        (
            (pictures[i % _PICTURES], f"What does picture {i} show?", f"noise of kind {i % 7}")
            for i in range(rows)
        ),
    )


def _write(path: Path, rows: Iterator[tuple[bytes, str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        group: list[dict[str, object]] = []
        for picture, question, answer in rows:
            image = {"bytes": picture, "path": None}
            group.append({"image": image, "question": question, "answer": answer})
            if len(group) == _GROUP:
                writer.write_table(pa.Table.from_pylist(group, _SCHEMA))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, _SCHEMA))
    return path


def _png(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
