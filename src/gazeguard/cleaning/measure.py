"""From rows to numbers: batches through the probe, blocks of records out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from gazeguard.cleaning.batches import (
    NO_MEMORY,
    Span,
    Unusable,
    batches,
    one_ahead,
    out_of_memory,
)
from gazeguard.cleaning.tower import recording, replaying, shared_towers
from gazeguard.errors import DataError
from gazeguard.probe.attention import attend
from gazeguard.report.model import NO_PICTURE
from gazeguard.signals.entropy import head_entropy, head_mass, visual_entropy, visual_mass
from gazeguard.types import KeyKind, Sample, SkipKind, SkippedRow, TextOnlyRow

if TYPE_CHECKING:
    from torch import Tensor

    from gazeguard.data.dataset import Dataset
    from gazeguard.models.target import Encoded, Target

log = logging.getLogger(__name__)

Record = dict[str, Any]
Numbers = dict[str, NDArray[np.float32]]

# The one list of what is measured and stored: functions of weights `(sample, layer, head, key)`
# and key kinds `(sample, key)` that give `(sample, layer)` or `(sample, layer, head)`.
SIGNALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": visual_entropy,
    "visual_mass": visual_mass,
    "head_entropy": head_entropy,
    "head_mass": head_mass,
}
# The same under the model before its fine-tune, where there is one: `before_entropy` and so on.
BEFORE = "before_"

MOST_READERS = 8  # threads that decode pictures for one accelerator

NOT_FINITE = "the model's numbers for this row are not finite (NaN or infinity)"
WORKER_DIED = "the worker that measured this row died, even with this row alone"

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("turn", pa.int64()),  # which of the row's answers, from 1; null when none was measured
        ("sample_id", pa.string()),
        ("reason", pa.string()),  # why the row was not measured; null when it was
        ("kind", pa.string()),  # `SkipKind` by name; null for a row of text alone too
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("image_tokens", pa.int64()),
        *((name, pa.list_(pa.float32())) for name in SIGNALS),
        *((BEFORE + name, pa.list_(pa.float32())) for name in SIGNALS),  # null without an adapter
    ]
)


def measure(
    look: Look,
    dataset: Dataset,
    blocks: Sequence[Span],
    batch_size: int | None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Span, pa.Table]]:
    """Measure blocks of input rows, given by first row and end, in rising order.

    Every row is also looked at by the model before its fine-tune, where `look` has it.

    Args:
        look: the model or models.
        dataset: the rows.
        blocks: what to measure; nothing that one block finds out reaches another.
        batch_size: rows per forward pass; None for what suits device and prompts.
        progress: called with the number of rows that were just measured.

    Yields:
        A block and one table row per answer, or per input row where none could be measured, in
        input order, with the columns of `SCHEMA`.

    Raises:
        DataError: the data set changed while it was read.
    """
    for (start, stop), records in zip(
        blocks, _measured(look, dataset, blocks, batch_size, progress), strict=True
    ):
        records.sort(key=lambda record: record["row"])
        if list(dict.fromkeys(record["row"] for record in records)) != list(range(start, stop)):
            raise DataError(
                f"The data set changed while it was read (around row {start}): "
                "run the same command again once nothing writes to it."
            )
        yield (start, stop), pa.Table.from_pylist(records, schema=SCHEMA)


def skipped_table(row: int, reason: str) -> pa.Table:
    """A block of one row that could not be measured, with the columns of `SCHEMA`."""
    skipped = SkippedRow(row, reason, kind=SkipKind.MEASUREMENT)
    return pa.Table.from_pylist([_unmeasured(skipped)], schema=SCHEMA)


def _measured(
    look: Look,
    dataset: Dataset,
    blocks: Sequence[Span],
    batch_size: int | None,
    progress: Callable[[int], None] | None,
) -> Iterator[list[Record]]:
    """The records of each block; within it, the order is that of measuring.

    What one block finds out (here: how many rows fit into memory) never reaches another, so a
    resumed run measures exactly as an uninterrupted one.
    """
    if not blocks:
        return
    first, end = blocks[0][0], blocks[-1][1]
    wanted = np.zeros(end - first, bool)  # a byte a row, and not a set of numbers
    for start, stop in blocks:
        wanted[start - first : stop - first] = True
    device = look.target.device
    # On a CPU, the model already keeps every core busy.
    threads = 0 if device.type == "cpu" else min(MOST_READERS, os.cpu_count() or 1)
    rows = dataset.rows(lambda row: bool(wanted[row - first]), range(first, end), threads)
    stream = batches(iter(rows), blocks, look.encode, batch_size, device, alike=True)
    if threads:
        stream = one_ahead(stream)
    records: list[Record] = []
    room: int | None = None
    with closing(stream):
        for batch in stream:
            records += [_unmeasured(item) for item in batch.unusable]
            for samples, encoded in batch.parts:
                found, room = _within_memory(look, samples, encoded, room)
                records += found
            if progress:
                progress(len(batch.unusable) + sum(len(samples) for samples, _ in batch.parts))
            if batch.ends_block:
                yield records
                records, room = [], None


def _within_memory(
    look: Look, samples: list[Sample], encoded: Encoded, room: int | None
) -> tuple[list[Record], int | None]:
    """Records of a batch, and the most rows that memory holds at once (None: no limit seen)."""
    if room is None or len(samples) <= room:
        try:
            return look(samples, encoded), room
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        # Outside of the handler: until it ends, the error keeps the failed forward's tensors.
        free_memory()
        if len(samples) == 1:
            return [_failed(samples[0], NO_MEMORY)], room
        room = len(samples) // 2
        log.info("Out of memory with %d rows at once: trying %d.", len(samples), room)
    records: list[Record] = []
    while samples:
        some, samples = samples[:room], samples[room:]
        found, room = _within_memory(look, some, look.encode(some), room)
        records += found
    return records, room


class Look:
    """One batch under the tuned model and, where there is one, the model before its fine-tune.

    Args:
        target: the tuned model.
        base: the model before a full fine-tune; not needed where `target` has an adapter.
    """

    def __init__(self, target: Target, base: Target | None) -> None:
        self.target = target
        self._base = base
        self._twice = base is not None or target.adapter is not None
        self._towers = shared_towers(target, base) if self._twice else None
        self._encoding = Lock()  # a tokenizer serves one thread at a time

    def encode(self, samples: Sequence[Sample]) -> Encoded:
        """`Target.encode` for every answer, from any thread."""
        with self._encoding:
            return self.target.encode(samples, every_answer=True)

    def __call__(self, samples: list[Sample], encoded: Encoded) -> list[Record]:
        """One record per answer; only one for a sample with an answer that gave no numbers."""
        numbers, finite = self._look(encoded)
        tokens = (encoded.key_kind == KeyKind.IMAGE).sum(-1).tolist()
        places = count()
        records: list[Record] = []
        for sample in samples:
            asked = [(next(places), each) for each in sample.asked]
            if not all(finite[place] for place, _ in asked):
                records.append(_failed(sample, NOT_FINITE))
                continue
            records += [
                {
                    "row": sample.row,
                    "turn": each.turn,
                    "sample_id": sample.sample_id,
                    "prompt": _utf8(each.prompt),
                    "answer": _utf8(each.answer),
                    "image_tokens": tokens[place],
                    **{name: signal[place] for name, signal in numbers.items()},
                }
                for place, each in asked
            ]
        return records

    def _look(self, encoded: Encoded) -> tuple[Numbers, NDArray[np.bool_]]:
        """Signals of one or both models, and which samples gave finite numbers."""
        if not self._twice:
            return _signals(self.target, encoded)
        with ExitStack() as first:
            pictures: list[Any] = []
            if self._towers is not None:
                first.enter_context(recording(self._towers[0], pictures))
            numbers, finite = _signals(self.target, encoded)
        with ExitStack() as second:
            if self._base is None:
                second.enter_context(self.target.without_adapter())
            if self._towers is not None:
                second.enter_context(replaying(self._towers[1], pictures))
            before, also_finite = _signals(self._base or self.target, encoded)
        return numbers | {BEFORE + k: v for k, v in before.items()}, finite & also_finite


def _signals(target: Target, encoded: Encoded) -> tuple[Numbers, NDArray[np.bool_]]:
    """Every signal, flat per sample, and which samples gave finite weights and logits."""
    rows = attend(target, encoded, reduce_heads=False)
    numbers = {
        name: signal(rows.weights, rows.key_kind).float().flatten(1).cpu().numpy()
        for name, signal in SIGNALS.items()
    }
    return numbers, rows.finite.cpu().numpy()


def _unmeasured(item: Unusable) -> Record:
    if isinstance(item, TextOnlyRow):
        return {"row": item.row, "reason": NO_PICTURE}
    record = {"row": item.row, "sample_id": item.sample_id, "kind": item.kind.name}
    return record | {"reason": _utf8(item.reason)}


def _failed(sample: Sample, reason: str) -> Record:
    """The model or the machine is at fault: the row itself can be read."""
    return _unmeasured(SkippedRow(sample.row, reason, sample.sample_id, SkipKind.MEASUREMENT))


def _utf8(text: str) -> str:
    """`text` without lone surrogates, which broken JSON may hold and Parquet cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def free_memory() -> None:
    """Hand unused memory of a failed or finished pass back to the accelerator."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
