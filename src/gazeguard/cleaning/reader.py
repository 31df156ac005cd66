"""Who looks at rows: this process, or, with the same two questions asked, workers elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from gazeguard.cleaning.fitting import TRIED_ROWS, fitting_batch
from gazeguard.cleaning.gallery import look_again
from gazeguard.cleaning.heap import keep_freed_memory
from gazeguard.cleaning.linear import fast_linear
from gazeguard.cleaning.measure import Look, free_memory, measure
from gazeguard.cleaning.proof import Group, prove
from gazeguard.data.columns import Columns
from gazeguard.data.dataset import Dataset, described
from gazeguard.data.read import open_dataset
from gazeguard.errors import UsageError
from gazeguard.models.device import chosen_device
from gazeguard.models.fingerprint import fingerprint
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.probe.store import Span
from gazeguard.provenance import attention_backend, provenance
from gazeguard.report.model import Answer, GalleryItem, Proof
from gazeguard.types import Sample

log = logging.getLogger(__name__)

Rows = Callable[[int], None]
"""Called with the number of rows that were just measured."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is looked at with what: the arguments of `clean` that a reader needs."""

    model: str
    data: Path
    adapter: str | None = None
    base: str | None = None
    images: Path | None = None
    format: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    columns: Columns | None = None

    def open_data(self) -> Dataset:
        """The data set; raises as `open_dataset`."""
        return open_dataset(
            self.data,
            images=self.images,
            format=self.format,
            columns=self.columns,
            need_answer=True,
        )


@dataclass(frozen=True, slots=True)
class About:
    """A reader in its own words.

    Attributes:
        record: of `provenance`, without arguments and seed.
        layers: decoder layer indices that it measures.
        device_type: `cpu`, `cuda` or `mps`.
        notes: for the log, what was chosen and why.
    """

    record: dict[str, Any]
    layers: tuple[int, ...]
    device_type: str
    notes: tuple[str, ...]


class Reader(Protocol):
    """Looks at rows."""

    def about(self) -> About:
        """What reads."""
        ...

    def fitting_batch(self) -> int:
        """Rows per forward pass, as `fitting_batch` finds them."""
        ...

    def blocks(
        self, spans: Sequence[Span], batch_size: int | None, rows: Rows
    ) -> Iterator[tuple[Span, pa.Table]]:
        """Measure blocks of rows as `measure` does, in any order."""
        ...

    def gallery(self, suspicion: Mapping[Answer, float]) -> dict[Answer, GalleryItem]:
        """Answers with their pictures and heat maps."""
        ...

    def prove(self, groups: Sequence[Group]) -> list[Proof]:
        """The rebuilt triggers of removed groups, and how often they fire."""
        ...


class Here:
    """Reads in this process.

    Args:
        job: what to look at with what.
        dataset: that of the job, where it is open already.

    Raises:
        UsageError, DataError, ModelError: one sentence that says what to change.
    """

    def __init__(self, job: Job, dataset: Dataset | None = None) -> None:
        self._job = job
        self._dataset = dataset or job.open_data()
        self._alone = dataset is None
        device_map, self._why = chosen_device(job.device)
        keep_freed_memory()
        options = (job.dtype, device_map, job.trust_remote_code)
        log.info(
            "Loading %s.",
            job.model if job.adapter is None else f"{job.model} with adapter {job.adapter}",
        )
        self._target = load(job.model, job.adapter, job.revision, *options)
        self._base = None
        if job.base is not None:
            self._base = load(job.base, None, None, *options)
            _same_kind(self._target, self._base)
        self._look = Look(self._target, self._base)

    def about(self) -> About:
        """What reads; hashes the model and the data."""
        target = self._target
        record = provenance(target, self._dataset, arguments={}, seed=0)
        if self._base is not None:
            record["base"] = fingerprint(self._base)
        asked = "as asked" if self._job.dtype != "auto" else "as stored, or float32 for a CPU"
        note = (
            f"Device {target.device} ({self._why}), {record['dtype']} ({asked}), attention"
            f" {attention_backend(target)} (the model's own choice)."
        )
        notes = (described(self._dataset), note) if self._alone else (note,)
        return About(record, target.layers, target.device.type, notes)

    def fitting_batch(self) -> int:
        """Rows per forward pass, tried on the first rows that can be read."""
        usable = (row for row in self._dataset.rows() if isinstance(row, Sample))
        samples = list(islice(usable, TRIED_ROWS))
        if not samples:
            return 1

        def rate(rows: list[Sample]) -> float:
            try:
                self._look(rows, self._look.encode(rows))  # the first time is not like the others
                began = time.perf_counter()
                self._look(rows, self._look.encode(rows))
            finally:
                free_memory()
            return len(rows) / (time.perf_counter() - began)

        with fast_linear():
            return fitting_batch(samples, rate)

    def blocks(
        self, spans: Sequence[Span], batch_size: int | None, rows: Rows
    ) -> Iterator[tuple[Span, pa.Table]]:
        """Measure blocks, in their order."""
        with fast_linear():
            yield from measure(self._look, self._dataset, spans, batch_size, rows)

    def gallery(self, suspicion: Mapping[Answer, float]) -> dict[Answer, GalleryItem]:
        """Answers with their pictures and heat maps."""
        with fast_linear():
            return look_again(self._target, self._dataset, suspicion)

    def prove(self, groups: Sequence[Group]) -> list[Proof]:
        """The rebuilt triggers of removed groups, and how often they fire."""
        with fast_linear():
            return prove(self._target, self._base, self._dataset, groups)


def _same_kind(target: Target, base: Target) -> None:
    """Both models must read the same tokens and have the same layers."""
    same = (
        type(target.base) is type(base.base)
        and target.layers == base.layers
        and target.image_token_id == base.image_token_id
    )
    if not same:
        raise UsageError(
            f"{base.name} is not what {target.name} was before its fine-tune (another kind of "
            "model or other layers): give its real base, or leave --base out."
        )
