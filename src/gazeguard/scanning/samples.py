"""Benign samples that are shown to model after model, read from disk each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gazeguard.data.dataset import Dataset
from gazeguard.data.read import open_dataset
from gazeguard.errors import DataError
from gazeguard.scanning.store import digest
from gazeguard.types import Sample, SkippedRow, TextOnlyRow


class SampleSet:
    """The first readable rows of a data set; only their places and hashes stay in memory.

    Args:
        path: the data set.
        images: folder that image paths are relative to.
        limit: at most so many samples.
        after: only rows behind this one; then there may be none.

    Raises:
        DataError: it cannot be read, or holds no readable row.
    """

    def __init__(self, path: Path, images: Path | None, limit: int, after: int = -1) -> None:
        self.path = path
        self._images = images
        self.rows: list[int] = []
        self.sample_ids: list[str] = []
        self.answered = 0
        self.skipped: list[SkippedRow] = []
        for item in self._dataset.rows(lambda row: row > after):
            if isinstance(item, TextOnlyRow):
                item = item.as_skipped()
            if isinstance(item, SkippedRow):
                self.skipped.append(item)
                continue
            self.rows.append(item.row)
            self.sample_ids.append(item.sample_id)
            self.answered += bool(item.answer)
            if len(self.rows) == limit:
                break
        if not self.rows and after < 0:
            reason = self.skipped[0].reason if self.skipped else "it is empty"
            raise DataError(f"no row of {path} can be read (first: {reason}): give benign samples.")

    @cached_property
    def _dataset(self) -> Dataset:
        return open_dataset(self.path, images=self._images)

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the files for itself, once it needs them.
        return {name: value for name, value in vars(self).items() if name != "_dataset"}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Sample]:
        return self.read(range(len(self)))

    def read(self, places: Sequence[int]) -> Iterator[Sample]:
        """The samples at these places of the set, in the set's order.

        Raises:
            DataError: a row that could be read before cannot be read any more.
        """
        wanted = {self.rows[place] for place in places}
        for item in self._dataset.rows(wanted.__contains__):
            if not isinstance(item, Sample):
                why = (item.as_skipped() if isinstance(item, TextOnlyRow) else item).reason
                raise DataError(
                    f"row {item.row} of {self.path} changed while it was used ({why}): run"
                    " the same command again once nothing writes to it."
                )
            yield item

    @property
    def fingerprint(self) -> str:
        """Changes with the samples or their order."""
        return digest(self.sample_ids)
