"""Measuring rows on a Ray cluster, with workers that may die at any moment.

A worker loads the model once and measures one block at a time. Blocks do not know of each other, so
it does not matter who measures which, or how often. A block whose workers keep dying is cut in
half, and again, until the row that kills them is alone; that row is skipped and the others are not.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from gazeguard._version import __version__
from gazeguard.cleaning.measure import WORKER_DIED, skipped_table
from gazeguard.cleaning.proof import Group
from gazeguard.cleaning.reader import About, Here, Job, Rows
from gazeguard.cluster import Workers, check_version
from gazeguard.errors import GazeguardError, MeasurementError
from gazeguard.probe.store import Span
from gazeguard.report.model import Answer, GalleryItem, Proof

log = logging.getLogger(__name__)

TRIES = 3  # of a whole block, of a single row, and of all that is not about rows
_AHEAD = 2  # blocks that a worker has: one under way, and the next
_DIED = (RayActorError, OutOfMemoryError, ObjectLostError)


class Worker:
    """What runs on the cluster: `Here`, made on first use so that its errors are results.

    Args:
        job: what to look at with what.
        threads: of this process.
    """

    def __init__(self, job: Job, threads: int) -> None:
        self._job, self._threads = job, threads
        self._here: Here | None = None

    def open(self) -> None:
        """Load the model."""
        self._reader()

    def about(self) -> About:
        """What reads."""
        return self._reader().about()

    def fitting_batch(self) -> int:
        """Rows per forward pass."""
        return self._reader().fitting_batch()

    def measure(self, span: Span, batch_size: int | None) -> pa.Table:
        """One block."""
        ((_, table),) = self._reader().blocks([span], batch_size, lambda rows: None)
        return table

    def gallery(self, suspicion: Mapping[Answer, float]) -> dict[Answer, GalleryItem]:
        """Answers with their pictures."""
        return self._reader().gallery(suspicion)

    def prove(self, groups: Sequence[Group]) -> list[Proof]:
        """Rebuilt triggers and how often they fire."""
        return self._reader().prove(groups)

    def _reader(self) -> Here:
        if self._here is None:
            torch.set_num_threads(self._threads)
            self._here = Here(self._job)
        return self._here


@dataclass(slots=True)
class _Task:
    """A block, or what is left of one, and how many workers died of it."""

    block: Span
    part: Span
    deaths: int = 0

    @property
    def suspect(self) -> bool:
        """Whether a worker died of it, or of more than it."""
        return self.deaths > 0 or self.part != self.block


class _Hand:
    """A worker and what it has to do, oldest first; None stands for loading the model.

    A dead one is replaced, not restarted: calls to an actor that Ray is restarting fail at once,
    those to a new one wait until it has found its place.
    """

    def __init__(self, job: Job, workers: Workers) -> None:
        self._made = ray.remote(Worker).options(**workers.resources), job, workers.cpus
        self.work: deque[tuple[Any, _Task | None]] = deque()
        self._failed_starts = 0
        self._start()

    def _start(self) -> None:
        kind, *arguments = self._made
        self.actor = kind.remote(*arguments)
        self.work.append((self.actor.open.remote(), None))

    def takes(self, task: _Task) -> bool:
        """Not while it loads. A suspect is measured alone: the death is then its own.

        A worker may die over one block before it has handed in the one before.
        """
        there = [other for _, other in self.work]
        return not there or not (
            task.suspect or any(other is None or other.suspect for other in there)
        )

    def done(self) -> _Task | None:
        """The oldest piece of work is done; gives it."""
        self._failed_starts = 0
        return self.work.popleft()[1]

    def replace(self) -> list[_Task]:
        """The worker is dead: start another. Gives the blocks it had, the one it died of first.

        Raises:
            MeasurementError: workers die while they load the model.
        """
        if self.work and self.work[0][1] is None:
            self._failed_starts += 1
            if self._failed_starts == TRIES:
                raise _too_often("loaded the model")
        left = [task for _, task in self.work if task is not None]
        self.work.clear()
        self._start()
        return left


class Spread:
    """A `Reader` whose rows are read by workers of a cluster.

    Args:
        job: what to look at with what; its paths must be good on every machine.
        workers: how many, and what each gets.
    """

    def __init__(self, job: Job, workers: Workers) -> None:
        self._job = replace(
            job,
            model=_absolute(job.model),
            data=job.data.resolve(),
            adapter=job.adapter and _absolute(job.adapter),
            base=job.base and _absolute(job.base),
            images=job.images and job.images.resolve(),
        )
        self._workers = workers
        self._hands: list[_Hand] = []

    def __enter__(self) -> Spread:
        self._hands = [_Hand(self._job, self._workers) for _ in range(self._workers.count)]
        return self

    def __exit__(self, *error: object) -> None:
        for hand in self._hands:
            ray.kill(hand.actor)

    def about(self) -> About:
        """What reads, in the words of one worker.

        Raises:
            UsageError: it has another version of gazeguard.
        """
        about: About = self._ask("about")
        check_version(about.record["gazeguard"], __version__)
        one = "a worker" if self._workers.count == 1 else f"{self._workers.count} workers"
        gpus = f" and {self._workers.gpus:g} GPUs" if self._workers.gpus else ""
        note = f"Ray: {one} of {self._workers.cpus} CPUs{gpus}."
        return replace(about, notes=(note, *about.notes))

    def gallery(self, suspicion: Mapping[Answer, float]) -> dict[Answer, GalleryItem]:
        """Answers with their pictures and heat maps, from one worker."""
        found: dict[Answer, GalleryItem] = self._ask("gallery", suspicion)
        return found

    def prove(self, groups: Sequence[Group]) -> list[Proof]:
        """The rebuilt triggers of removed groups, from one worker."""
        found: list[Proof] = self._ask("prove", groups)
        return found

    def fitting_batch(self) -> int:
        """Rows per forward pass, tried by one worker for all."""
        found: int = self._ask("fitting_batch")
        return found

    def blocks(
        self, spans: Sequence[Span], batch_size: int | None, rows: Rows
    ) -> Iterator[tuple[Span, pa.Table]]:
        """Measure blocks, in the order in which workers are done with them.

        Raises:
            GazeguardError: what a worker raised.
            MeasurementError: workers die before they have measured anything.
        """
        todo = deque(_Task(span, span) for span in spans)
        parts: dict[Span, list[tuple[Span, pa.Table]]] = {}
        self._fill(todo, batch_size)
        while any(task for hand in self._hands for _, task in hand.work) or todo:
            for task, table in self._next(todo):
                start, stop = task.part
                rows(stop - start)
                done = parts.setdefault(task.block, [])
                done.append((task.part, table))
                if sum(b - a for (a, b), _ in done) == task.block[1] - task.block[0]:
                    ordered = sorted(parts.pop(task.block), key=lambda part: part[0])
                    yield task.block, pa.concat_tables([table for _, table in ordered])
            self._fill(todo, batch_size)

    def _fill(self, todo: deque[_Task], batch_size: int | None) -> None:
        """Give work to whoever has too little; a worker that still loads gets none."""
        for depth in range(1, _AHEAD + 1):  # everybody one block, then everybody the next
            for hand in self._hands:
                if todo and len(hand.work) < depth and hand.takes(todo[0]):
                    task = todo.popleft()
                    ref = hand.actor.measure.remote(task.part, batch_size)
                    hand.work.append((ref, task))

    def _next(self, todo: deque[_Task]) -> list[tuple[_Task, pa.Table]]:
        """Wait until a worker is done with something, or dead; gives what was measured."""
        first = {hand.work[0][0]: hand for hand in self._hands if hand.work}
        (ref,), _ = ray.wait([*first], num_returns=1)
        hand = first[ref]
        try:
            table = ray.get(ref)
        except _DIED:
            loading = hand.work[0][1] is None
            left = hand.replace()
            todo.extendleft(reversed(left[not loading :]))
            return [] if loading else self._bury(left[0], todo)
        except RayTaskError as error:
            raise _cause(error) from None
        task = hand.done()
        return [] if task is None else [(task, table)]

    def _bury(self, guilty: _Task, todo: deque[_Task]) -> list[tuple[_Task, pa.Table]]:
        """What is to be done with the rows that a worker died of."""
        guilty.deaths += 1
        start, stop = guilty.part
        log.info("A worker died over rows %d to %d.", start, stop - 1)
        is_whole, is_row = guilty.part == guilty.block, stop - start == 1
        if (is_whole or is_row) and guilty.deaths < TRIES:
            todo.append(guilty)  # last: who kills at random should not find it again
        elif is_row:
            return [(guilty, skipped_table(start, WORKER_DIED))]
        else:
            middle = (start + stop) // 2
            halves = ((start, middle), (middle, stop))
            todo.extend(_Task(guilty.block, half) for half in halves)
        return []

    def _ask(self, what: str, *args: Any) -> Any:
        """Something that one worker can answer for all."""
        hand = self._hands[0]
        for _ in range(TRIES):
            try:
                return ray.get(getattr(hand.actor, what).remote(*args))
            except _DIED:
                hand.replace()
            except RayTaskError as error:
                raise _cause(error) from None
        raise _too_often("looked at the data")


def _too_often(when: str) -> MeasurementError:
    return MeasurementError(
        f"A worker died {TRIES} times while it {when}: give workers more memory, or more room each"
        " with --worker-cpus or --worker-gpus."
    )


def _cause(error: RayTaskError) -> BaseException:
    """A worker's error as it was raised there; a bug keeps the worker's traceback."""
    cause = error.cause
    return cause if isinstance(cause, GazeguardError | OSError) else error


def _absolute(name: str) -> str:
    """A folder's full path; a hub id stays what it is."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name
