"""From rows to numbers: batches through the probe, blocks into the store, one `Profile` out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from gazeguard.cleaning.batches import NO_MEMORY, Span, batches, one_ahead, out_of_memory
from gazeguard.cleaning.tower import recording, replaying, shared_towers
from gazeguard.errors import DataError
from gazeguard.probe.attention import attend
from gazeguard.probe.store import BlockStore
from gazeguard.signals.entropy import head_entropy, head_mass, visual_entropy, visual_mass
from gazeguard.types import KeyKind, Profile, Sample

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

NOT_FINITE = "the model's numbers for this row are not finite (NaN or infinity)"
# Reasons that lie with the model or machine: the row itself can be read.
NOT_THE_ROWS_FAULT = (NOT_FINITE, NO_MEMORY)

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample_id", pa.string()),
        ("reason", pa.string()),  # why the row was skipped; null when it was measured
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("image_tokens", pa.int64()),
        *((name, pa.list_(pa.float32())) for name in SIGNALS),
        *((BEFORE + name, pa.list_(pa.float32())) for name in SIGNALS),  # null without an adapter
    ]
)


Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all; first with those that were there already."""


def measure(
    target: Target,
    dataset: Dataset,
    store: BlockStore,
    *,
    base: Target | None = None,
    total: int,
    batch_size: int | None,
    block_rows: int,
    progress: Progress | None = None,
) -> pa.Table:
    """Measure input rows `0` up to `total`, taking from `store` what is already there.

    Every row is also looked at by the model before its fine-tune: `base`, or `target` without its
    adapter.

    Returns:
        One table row per input row, in input order, with the columns of `SCHEMA`.

    Raises:
        DataError: the data set changed while it was read.
        OSError: a block could not be written; those before it are safe.
    """
    ranges = [(a, min(a + block_rows, total)) for a in range(0, total, block_rows)]
    blocks = {span: store.read(*span) for span in ranges}
    missing = [span for span, block in blocks.items() if block is None]
    done = total - sum(stop - start for start, stop in missing)
    if progress:
        progress(done, total)
    look = Look(target, base)
    for (start, stop), records in zip(
        missing, _measured(look, dataset, missing, batch_size, done, total, progress), strict=True
    ):
        records.sort(key=lambda record: record["row"])
        if [record["row"] for record in records] != list(range(start, stop)):
            raise DataError(
                f"The data set changed while it was read (around row {start}): "
                "run the same command again once nothing writes to it."
            )
        block = pa.Table.from_pylist(records, schema=SCHEMA)
        store.write(start, stop, block)
        blocks[start, stop] = block
    tables = [block for block in blocks.values() if block is not None]
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def profile_of(table: pa.Table, layers: tuple[int, ...]) -> Profile:
    """The measured rows of `measure`'s table as what a method may see."""
    measured = table.filter(pc.is_null(table["reason"]))
    n = measured.num_rows
    return Profile(
        row=measured["row"].to_numpy(),
        sample_id=measured["sample_id"].to_pylist(),
        prompt=measured["prompt"].to_pylist(),
        answer=measured["answer"].to_pylist(),
        image_tokens=measured["image_tokens"].to_numpy(),
        layers=layers,
        signals={name: _array(measured[name], len(layers)) for name in SIGNALS},
        before=(
            {name: _array(measured[BEFORE + name], len(layers)) for name in SIGNALS}
            if n and measured[BEFORE + "entropy"].null_count == 0
            else None
        ),
    )


def _array(column: pa.ChunkedArray, layers: int) -> NDArray[np.float32]:
    """`(rows, layers)`, or `(rows, layers, heads)` where rows hold a value for every head."""
    flat = np.asarray(column.combine_chunks().flatten(), dtype=np.float32)
    values = flat.reshape(len(column), layers, -1 if len(flat) else 1)
    return values[..., 0] if values.shape[2] == 1 else values


def _measured(
    look: Look,
    dataset: Dataset,
    blocks: list[Span],
    batch_size: int | None,
    done: int,
    total: int,
    progress: Progress | None,
) -> Iterator[list[Record]]:
    """The records of each block; within it, the order is that of measuring.

    What one block finds out (here: how many rows fit into memory) never reaches another, so a
    resumed run measures exactly as an uninterrupted one.
    """
    if not blocks:
        return
    wanted = frozenset(chain.from_iterable(range(*block) for block in blocks))
    device = look.target.device
    stream = batches(
        iter(dataset.rows(wanted.__contains__)), blocks, look.encode, batch_size, device
    )
    if device.type != "cpu":  # on a CPU, the model already keeps every core busy
        stream = one_ahead(stream)
    records: list[Record] = []
    room: int | None = None
    with closing(stream):
        for batch in stream:
            records += [_skipped(s.row, s.sample_id, s.reason) for s in batch.unusable]
            for samples, encoded in batch.parts:
                found, room = _within_memory(look, samples, encoded, room)
                records += found
            if progress:
                progress(done + len(records), total)
            if batch.ends_block:
                yield records
                done += len(records)
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
        _free_memory()
        if len(samples) == 1:
            return [_skipped(samples[0].row, samples[0].sample_id, NO_MEMORY)], room
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
        """`Target.encode`, from any thread."""
        with self._encoding:
            return self.target.encode(samples)

    def __call__(self, samples: list[Sample], encoded: Encoded) -> list[Record]:
        """One record per sample."""
        numbers, finite = self._look(encoded)
        tokens = (encoded.key_kind == KeyKind.IMAGE).sum(-1).tolist()
        return [
            {
                "row": sample.row,
                "sample_id": sample.sample_id,
                "prompt": _utf8(sample.prompt),
                "answer": _utf8(sample.answer),
                "image_tokens": tokens[i],
                **{name: signal[i] for name, signal in numbers.items()},
            }
            if finite[i]
            else _skipped(sample.row, sample.sample_id, NOT_FINITE)
            for i, sample in enumerate(samples)
        ]

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


def _skipped(row: int, sample_id: str | None, reason: str) -> Record:
    return {"row": row, "sample_id": sample_id, "reason": _utf8(reason)}


def _utf8(text: str) -> str:
    """`text` without lone surrogates, which broken JSON may hold and Parquet cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
