"""The queue of requests and the one thread that owns the model."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from tokenizers import Tokenizer

from gazeguard.guarding.guard import Guard
from gazeguard.guarding.requests import Conversation
from gazeguard.models.target import Encoded
from gazeguard.server.batch import encode
from gazeguard.server.decode import Row, answer
from gazeguard.server.errors import internal
from gazeguard.server.job import Job
from gazeguard.server.metrics import Metrics
from gazeguard.server.settings import Settings

State = Literal["loading", "ready", "draining", "failed"]
log = logging.getLogger("gazeguard.server")


class Engine:
    """Answers requests in batches; made in the main thread, used by the event loop.

    Requests that fit together are taken together, the oldest first. A batch runs until its last
    answer is complete or nobody waits for it any more; then the next one begins.

    Args:
        load: gives the guard with its model; called in the worker.
        settings: of the server.

    Attributes:
        state: where the server stands.
        error: why loading failed.
        metrics: what is counted.
    """

    def __init__(self, load: Callable[[], Guard], settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.state: State = "loading"
        self.error: Exception | None = None
        self._load = load
        self._guard: Guard | None = None
        self._tokenizer: Tokenizer | None = None
        self._waiting: deque[Job] = deque()
        self._running: Sequence[Job] = ()
        self._changed = threading.Condition()
        self._stopping = False
        self._worker = threading.Thread(target=self._work, name="gazeguard-model", daemon=True)

    # Called by the event loop.

    def start(self) -> None:
        """Begin to load the model."""
        self._worker.start()

    def drain(self) -> None:
        """Take no more requests; those in the house are answered."""
        if self.state in ("loading", "ready"):
            self.state = "draining"

    def stop(self) -> None:
        """Give up what waits or runs, and wait for the worker to end its step."""
        with self._changed:
            self._stopping = True
            for job in [*self._waiting, *self._running]:
                job.cancelled = True
            self._changed.notify_all()
        if self._guard is not None:  # loading cannot be interrupted, and owes nobody anything
            self._worker.join()

    @property
    def guard(self) -> Guard:
        """The guard; only after loading."""
        assert self._guard is not None, "asked before the model was loaded"
        return self._guard

    @property
    def room(self) -> int | None:
        """Positions that the model has for prompt and answer; None when it does not say."""
        config = self.guard.target.base.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def encode(self, conversation: Conversation) -> Encoded:
        """A conversation as the worker takes it; raises `ApiError`."""
        return encode(self.guard.target, conversation)

    def submit(self, job: Job) -> None:
        """Put a request into the queue."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()

    def forget(self, job: Job) -> None:
        """Nobody waits for this request any more; its place is free."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    # The worker.

    def _work(self) -> None:
        try:
            guard = self._load()
            # A copy: the tokenizer itself is at work in the threads that encode.
            tokenizer = Tokenizer.from_str(
                guard.target.processor.tokenizer.backend_tokenizer.to_str()
            )
        except Exception as error:
            self.error, self.state = error, "failed"
            return
        self._guard, self._tokenizer = guard, tokenizer
        if self.state == "loading":
            self.state = "ready"
        while batch := self._next():
            self.metrics.batch.observe(len(batch))
            self.metrics.running.set(len(batch))
            self._answer(batch)
            with self._changed:
                self._running = ()
            self.metrics.running.set(0)

    def _next(self) -> list[Job]:
        """Wait for requests and take those that fit to the oldest; none when it is over."""
        until = None
        with self._changed:
            while not self._stopping:
                batch, now = self._fitting(), time.monotonic()
                if not batch:
                    until = None
                    self._changed.wait()
                    continue
                until = now + self.settings.max_wait if until is None else until
                if len(batch) < self.settings.max_batch and now < until:
                    self._changed.wait(until - now)
                    continue
                for job in batch:
                    self._waiting.remove(job)
                self._running = batch
                return batch
        return []

    def _fitting(self) -> list[Job]:
        kind = self._waiting[0].kind if self._waiting else None
        return [job for job in self._waiting if job.kind == kind][: self.settings.max_batch]

    def _answer(self, batch: Sequence[Job]) -> None:
        assert self._tokenizer is not None, "made before the first batch"
        rows = [Row(job, self._tokenizer, self.metrics) for job in batch]
        try:
            answer(self.guard, rows, self.settings)
            return
        except Exception as error:
            if len(rows) == 1 or any(row.begun for row in rows):
                failure = internal()
                for row in rows:
                    row.fail(failure)
                return
            log.warning("A batch of %d failed (%s): one by one.", len(rows), error)
        # Out of the handler, which keeps the failed batch in memory.
        # One request must not take others with it, nor memory that only all need at once.
        for job in batch:
            self._answer([job])
