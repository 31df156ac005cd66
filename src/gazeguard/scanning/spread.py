"""Who does the work of a scan: this process, or the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gazeguard.cluster import Ray, connected
from gazeguard.errors import WorkerLost
from gazeguard.ray_pool import RayPool, ray_pool

T = TypeVar("T")
R = TypeVar("R")


class Hands(Protocol):
    """Those who work.

    Attributes:
        here: whether work is done in this process, so that it sees what earlier work left in
            memory, and may call back.
        has_gpu: whether they may use one.
    """

    here: bool
    has_gpu: bool

    def call(self, work: Callable[..., R], *arguments: Any) -> R:
        """The result of one call."""

    def each(
        self, work: Callable[[T], R], items: Sequence[T]
    ) -> Iterator[tuple[int, R | WorkerLost]]:
        """Place and result of every item, as they are done; `WorkerLost` for those never done."""


class Here:
    """This process; one item after the other, in order."""

    here = True
    has_gpu = True

    def call(self, work: Callable[..., R], *arguments: Any) -> R:
        """The result of one call."""
        return work(*arguments)

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """Place and result of every item."""
        for place, item in enumerate(items):
            yield place, work(item)


class Spread:
    """Workers of a cluster; what `work` holds travels once to each machine."""

    here = False

    def __init__(self, pool: RayPool, has_gpu: bool) -> None:
        self._pool, self.has_gpu = pool, has_gpu

    def call(self, work: Callable[..., R], *arguments: Any) -> R:
        """The result of one call, of one worker.

        Raises:
            WorkerLost: the worker died each time.
        """
        return self._pool.submit(work, *arguments).result()

    def each(
        self, work: Callable[[T], R], items: Sequence[T]
    ) -> Iterator[tuple[int, R | WorkerLost]]:
        """Place and result of every item, as they are done; `WorkerLost` for those never done."""
        shared = self._pool.share(work)
        futures = {
            self._pool.submit(_applied, shared, item): place for place, item in enumerate(items)
        }
        for future in as_completed(futures):
            result: R | WorkerLost
            try:
                result = future.result()
            except WorkerLost as error:
                result = error
            yield futures[future], result


@contextmanager
def hands(ray: Ray | None, shared: Sequence[Path]) -> Iterator[Hands]:
    """This process, or with `ray` a cluster's workers, all of which see the `shared` folders.

    Raises:
        MissingExtra: ray is not installed.
        UsageError: the cluster cannot be reached, or is too small.
        OSError: a folder cannot be written.
    """
    if ray is None:
        yield Here()
        return
    with (
        connected(ray) as workers,
        ray_pool(workers, partial(_quiet, workers.cpus), shared=shared) as pool,
    ):
        yield Spread(pool, workers.gpus > 0)


def _applied(work: Callable[[T], R], item: T) -> R:
    return work(item)


def _quiet(threads: int) -> None:
    """A worker's first act: its threads, and nothing but gazeguard's own messages."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
