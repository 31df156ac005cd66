"""Memory and time of `clean` beside the model: rows that are read, and numbers that are recorded.

The recorded numbers stand for those of a small model or of one of 7B; all else is the real thing.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from gazeguard.bench.scale.sets import small_set
from gazeguard.bench.speed.instruments import MIB, Figure, Part, Spread, in_child
from gazeguard.cleaning import clean, run
from gazeguard.cleaning.measure import BEFORE, SCHEMA, SIGNALS
from gazeguard.cleaning.proof import Group
from gazeguard.cleaning.reader import About, Job, Rows
from gazeguard.data.dataset import Dataset
from gazeguard.probe.store import Span
from gazeguard.provenance import environment
from gazeguard.report.model import Answer, GalleryItem, Proof
from gazeguard.types import Sample

RATE = "beside a model of 32 layers and 32 heads"  # how the name of that figure ends
SMALL, LARGE = (4, 4), (32, 32)  # layers and heads
IMAGE_TOKENS = 64


class Recorded:
    """A `Reader` that decodes every row and looks its numbers up in a random table."""

    shape = SMALL

    def __init__(self, job: Job, dataset: Dataset) -> None:
        self._dataset = dataset
        layers, heads = self.shape
        rng = np.random.default_rng(0)
        self._tables = {
            prefix + name: rng.uniform(1, 4, (1000, layers * (heads if "head" in name else 1)))
            .round(3)
            .astype(np.float32)
            for prefix in ("", BEFORE)
            for name in SIGNALS
        }
        for name, table in self._tables.items():
            if "mass" in name:
                table /= 5  # a share

    def about(self) -> About:
        """A record without a model."""
        data: dict[str, Any] = {"path": str(self._dataset.path), "format": self._dataset.format}
        data |= {"rows": self._dataset.count(), "fingerprint": self._dataset.fingerprint()}
        record = {**environment(), "model": {"id": "recorded", "name": "recorded"}, "data": data}
        record |= {"device": "cpu", "dtype": "float32", "attention": "recorded"}
        return About(record, tuple(range(self.shape[0])), "cpu", ())

    def fitting_batch(self) -> int:
        """Any would do."""
        return 1

    def blocks(
        self, spans: Sequence[Span], batch_size: int | None, rows: Rows
    ) -> Iterator[tuple[Span, pa.Table]]:
        """Blocks of rows that were read and decoded."""
        stream = self._dataset.rows()
        for start, stop in spans:
            found = [self._record(sample) for sample in islice(stream, stop - start)]
            rows(stop - start)
            yield (start, stop), pa.Table.from_pylist(found, schema=SCHEMA)

    def gallery(self, suspicion: Mapping[Answer, float]) -> dict[Answer, GalleryItem]:
        """No model, no heat."""
        return {}

    def prove(self, groups: Sequence[Group]) -> list[Proof]:
        """No model, no answers."""
        return [Proof(group.phrase, "there is no model to ask") for group in groups]

    def _record(self, sample: Any) -> dict[str, Any]:
        assert isinstance(sample, Sample)
        place = int(sample.sample_id[:8], 16) % 1000
        return {
            "row": sample.row,
            "turn": 1,
            "sample_id": sample.sample_id,
            "prompt": sample.prompt,
            "answer": sample.answer,
            "image_tokens": IMAGE_TOKENS,
            **{name: table[place] for name, table in self._tables.items()},
        }


@contextmanager
def _watched() -> Iterator[dict[str, float]]:
    """Peaks of this process's memory in MiB, looked at ten times a second.

    `own` is what only this process has (heap and stacks); `resident` counts pages of mapped files
    too, which the system takes back when somebody needs them.
    """
    peaks = {"own": 0.0, "resident": 0.0}
    over, process = threading.Event(), psutil.Process()

    def look() -> None:
        while not over.wait(0.1):
            found = process.memory_info()
            peaks["own"] = max(peaks["own"], (found.rss - found.shared) / MIB)
            peaks["resident"] = max(peaks["resident"], found.rss / MIB)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()


def memory(work: Path, few: int, many: int, threads: int) -> Part:
    """Two sizes of the small model and one of the large, each in a process of its own."""
    module = "gazeguard.bench.scale.memory"

    def one(rows: int, shape: tuple[int, int]) -> dict[str, float]:
        place = work / f"{rows}-{shape[0]}"
        found: dict[str, float] = in_child(
            module, {"work": str(place), "rows": rows, "shape": shape}, threads
        )
        shutil.rmtree(place)
        return found

    found = {str(rows): one(rows, SMALL) for rows in (few, many)}
    wide = one(few, LARGE)
    small, large = found.values()
    what = f"{many:,} rows / {few:,} rows, beside the model"

    def times(name: str, per: float = 1.0) -> Spread:
        return Spread.of([large[name] / small[name] / per])

    figures = [
        Figure(f"clean of {int(n):,} rows: peak of own memory", "MiB", Spread.of([f["own"]]))
        for n, f in found.items()
    ]
    figures += [
        Figure(f"{what}: peak of own memory", "x", times("own"), at_most=1.10),
        Figure(f"{what}: peak of resident memory, mapped files too", "x", times("resident")),
        Figure(f"{what}: time per row", "x", times("seconds", many / few), at_most=1.10),
        Figure(
            f"clean of {many:,} rows, beside a small model",
            "rows/s",
            Spread.of([many / large["seconds"]]),
        ),
        Figure(f"clean of {few:,} rows, {RATE}", "rows/s", Spread.of([few / wide["seconds"]])),
    ]
    return figures, {"found": found, "wide": wide}


def _child(arguments: dict[str, Any]) -> dict[str, float]:
    work, rows = Path(arguments["work"]), arguments["rows"]
    Recorded.shape = tuple(arguments["shape"])
    data = small_set(work / "set.parquet", rows)
    run.Here = Recorded  # type: ignore[attr-defined,assignment]
    warm = small_set(work / "warm.parquet", 200)
    clean("recorded", warm, work / "warm", device="cpu")  # imports and caches, in both sizes
    began = time.perf_counter()
    with _watched() as peaks:
        clean("recorded", data, work / "out", device="cpu")
    return {"seconds": time.perf_counter() - began, **peaks}


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
