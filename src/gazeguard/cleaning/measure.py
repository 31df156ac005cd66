"""From rows to numbers: batches through the probe, blocks into the store, one `Profile` out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from gazeguard.errors import DataError, RowError
from gazeguard.probe.attention import attend
from gazeguard.probe.store import BlockStore
from gazeguard.signals.entropy import head_entropy, head_mass, visual_entropy, visual_mass
from gazeguard.types import KeyKind, Profile, Sample, SkippedRow

if TYPE_CHECKING:
    from torch import Tensor

    from gazeguard.data.dataset import Dataset
    from gazeguard.models.target import Encoded, Target

log = logging.getLogger(__name__)

Record = dict[str, Any]

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
NO_MEMORY = "not enough memory to measure this row, even alone"
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
    batch_size: int,
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
    wanted = frozenset(chain.from_iterable(range(*span) for span in missing))
    rows = iter(dataset.rows(wanted.__contains__)) if missing else iter(())
    for start, stop in missing:
        records = []
        for record in _measure_block(
            partial(_measure_batch, target, base), islice(rows, stop - start), batch_size
        ):
            records.append(record)
            if progress:
                progress(done + len(records), total)
        records.sort(key=lambda record: record["row"])
        if [record["row"] for record in records] != list(range(start, stop)):
            raise DataError(
                f"The data set changed while it was read (around row {start}): "
                "run the same command again once nothing writes to it."
            )
        block = pa.Table.from_pylist(records, schema=SCHEMA)
        store.write(start, stop, block)
        blocks[start, stop] = block
        done += stop - start
    tables = [block for block in blocks.values() if block is not None]
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def profile_of(table: pa.Table, layers: tuple[int, ...]) -> Profile:
    """The measured rows of `measure`'s table as what a method may see."""
    measured = table.filter(pa.compute.is_null(table["reason"]))
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


def _measure_block(
    look: Callable[[Sequence[Sample]], list[Record]],
    rows: Iterable[Sample | SkippedRow],
    batch_size: int,
) -> Iterator[Record]:
    """One record per row; the order is that of measuring.

    What one block finds out (here: the batch size that fits into memory) never reaches another,
    so a resumed run measures exactly as an uninterrupted one.
    """
    limit = batch_size
    waiting: list[Sample] = []
    stream = iter(rows)
    while True:
        while len(waiting) < limit and (item := next(stream, None)) is not None:
            if isinstance(item, SkippedRow):
                yield _skipped(item.row, item.sample_id, item.reason)
            else:
                waiting.append(item)
        if not waiting:
            return
        batch = waiting[:limit]
        try:
            records = look(batch)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            records = None
        # Outside of the handler: until it ends, the error keeps the failed forward's tensors.
        if records is None:
            _free_memory()
            if len(batch) == 1:
                records = [_skipped(batch[0].row, batch[0].sample_id, NO_MEMORY)]
            else:
                limit = len(batch) // 2
                log.info("Out of memory with %d rows at once: trying %d.", len(batch), limit)
                continue
        yield from records
        waiting = waiting[len(batch) :]


def _measure_batch(target: Target, base: Target | None, samples: Sequence[Sample]) -> list[Record]:
    try:
        encoded = target.encode(samples)
    except RowError as error:
        if len(samples) == 1:
            return [_skipped(samples[0].row, samples[0].sample_id, str(error))]
        return [r for sample in samples for r in _measure_batch(target, base, [sample])]
    numbers, finite = _look(target, encoded)
    if base is not None or target.adapter is not None:
        with target.without_adapter() if base is None else nullcontext():
            before, also_finite = _look(base or target, encoded)
        numbers |= {BEFORE + name: values for name, values in before.items()}
        finite &= also_finite
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


def _look(
    target: Target, encoded: Encoded
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_]]:
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


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()  # the CPU and MPS allocators raise a plain RuntimeError
    return "out of memory" in text or "can't allocate memory" in text


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
