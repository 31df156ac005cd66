"""From rows to encoded batches: how many rows at once, and the next ones while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch

from gazeguard.errors import RowError
from gazeguard.types import Sample, SkipKind, SkippedRow, TextOnlyRow

if TYPE_CHECKING:
    from gazeguard.models.target import Encoded

NO_MEMORY = "not enough memory to measure this row, even alone"

# Measured on one core: prompts of 80 tokens are fastest about 16 at a time; of 600 and of 2,300,
# one by one, because padding takes sdpa off its causal path, which costs more than a batch brings.
CPU_TOKENS = 1200
ACCELERATOR_ROWS = 8
CPU_ROWS = 16  # before the first row's length is known

WINDOW = 4  # batches
WINDOW_PIXELS = 2**24  # 48 MiB when decoded

Span = tuple[int, int]
Unusable = SkippedRow | TextOnlyRow
Encode = Callable[[Sequence[Sample]], "Encoded"]
Part = tuple[list[Sample], "Encoded"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows on their way to the model.

    Attributes:
        parts: samples and what the model gets for them; several only where a row was refused.
        unusable: rows that could not be read, that this model cannot take, or of text alone.
        ends_block: whether these are the last rows of their block.
    """

    parts: list[Part]
    unusable: list[Unusable]
    ends_block: bool


def batches(
    rows: Iterator[Sample | Unusable],
    blocks: Iterable[Span],
    encode: Encode,
    batch_size: int | None,
    device: torch.device,
    alike: bool = False,
) -> Generator[Batch]:
    """Encode rows, each block apart from the others.

    No batch reaches over the end of a block, and no size is carried over it, so that which blocks
    were measured before never changes a batch.

    Args:
        rows: the rows of all blocks, one after the other.
        blocks: first row and end of each.
        encode: makes the model's inputs; raises `RowError` for a row that it cannot take.
        batch_size: rows at once; None for a size that suits the device and the prompts' length.
        device: where the model runs.
        alike: rows of like length share a batch; otherwise rows keep their order.
    """
    for start, stop in blocks:
        block = islice(rows, stop - start)
        size, ends = batch_size, False
        if size is None and device.type != "cpu":
            size = ACCELERATOR_ROWS
        while not ends:
            samples, unusable, ends = _window(block, size, WINDOW if alike else 1)
            if alike:
                samples.sort(key=bulk, reverse=True)  # stable: equal ones keep their order
            while True:
                if size is None:
                    size = _fitting(_encoded(samples[:1], encode, []))
                now, samples = samples[: size or 1], samples[size or 1 :]
                parts = _encoded(now, encode, unusable)
                yield Batch(parts, unusable, ends and not samples)
                if batch_size is None and device.type == "cpu":
                    size = _fitting(parts)
                if not samples:
                    break
                unusable = []


def _window(
    block: Iterator[Sample | Unusable], size: int | None, window: int
) -> tuple[list[Sample], list[Unusable], bool]:
    """The next rows of a block that batches are made from, and whether they are its last.

    Rows of like length share a batch: padding is computed like everything else. So a few batches'
    worth of rows is held, or a single batch of large pictures (`WINDOW_PIXELS`).
    """
    samples: list[Sample] = []
    unusable: list[Unusable] = []
    pixels, most = 0, window * (size or CPU_ROWS)
    for item in block:
        if not isinstance(item, Sample):
            unusable.append(item)
            continue
        samples.append(item)
        pixels += sum(image.width * image.height for image in item.images)
        enough = len(samples) >= (size or 1) and pixels >= WINDOW_PIXELS
        if enough or len(samples) >= most:
            return samples, unusable, False
    return samples, unusable, True


def bulk(sample: Sample) -> float:
    """A row's length in tokens, roughly: 28 x 28 pixels or four letters are one."""
    last = sample.asked[-1]
    pixels = sum(sample.images[i].width * sample.images[i].height for i in last.prompt_images)
    words = "\n".join(t.text for t in last.prompt_turns if t.role != "system" and t.text)
    return pixels / 28**2 + len(words) / 4


def one_ahead(items: Iterator[T]) -> Generator[T]:
    """The same items, each made in another thread while its predecessor is used.

    Reading and encoding take a processor's time, the model that of an accelerator.
    """
    end = object()
    with ThreadPoolExecutor(1, "gazeguard-read") as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocator had nothing left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()  # the CPU and MPS allocators raise a plain RuntimeError
    return "out of memory" in text or "can't allocate memory" in text


def _fitting(parts: list[Part]) -> int | None:
    """Rows of about this length that a CPU should get at once; None when there are none to tell."""
    tokens = max((encoded.key_kind.shape[1] for _, encoded in parts), default=0)
    return max(1, CPU_TOKENS // tokens) if tokens else None


def _encoded(samples: list[Sample], encode: Encode, unusable: list[Unusable]) -> list[Part]:
    """All samples together, or each alone when they cannot be; the refused go to `unusable`."""
    if not samples:
        return []
    try:
        return [(samples, encode(samples))]
    except (RowError, MemoryError, RuntimeError) as error:
        if not isinstance(error, RowError) and not out_of_memory(error):
            raise
        refused = isinstance(error, RowError)
        why = str(error) if refused else NO_MEMORY
        kind = SkipKind.BAD_ROW if refused else SkipKind.MEASUREMENT
    if len(samples) > 1:
        return [part for sample in samples for part in _encoded([sample], encode, unusable)]
    unusable.append(SkippedRow(samples[0].row, why, samples[0].sample_id, kind))
    return []
