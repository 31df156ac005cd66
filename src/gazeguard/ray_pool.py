"""An executor whose workers are processes of a Ray cluster; `scan` and `bench` use it."""

from __future__ import annotations

import logging
import os
import platform
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, ParamSpec, TypeVar

from gazeguard._version import __version__
from gazeguard.cluster import Workers, check_version
from gazeguard.errors import GazeguardError, UsageError, WorkerLost

P = ParamSpec("P")
R = TypeVar("R")

_RETRIES = 2  # of work whose process died
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_log = logging.getLogger("gazeguard")
_begun = ""  # the pool that this worker process was made ready for


@dataclass(frozen=True, slots=True)
class _Start:
    """What makes a worker process ready.

    Attributes:
        pool: name of the pool, different for each.
        folder: that relative paths start from.
        level: of gazeguard's messages.
        tokens: files that are there if the worker sees the driver's folders.
        act: the caller's own first act.
        version: of the driver's gazeguard.
    """

    pool: str
    folder: str
    level: int
    tokens: tuple[Path, ...]
    act: Callable[[], None]
    version: str = __version__

    def once(self) -> None:
        """Make this process ready, unless it is."""
        global _begun
        if _begun == self.pool:
            return
        check_version(__version__, self.version, f"the worker on {platform.node()}")
        with suppress(OSError):  # not everybody uses relative paths
            os.chdir(self.folder)
        for token in self.tokens:
            if not token.is_file():
                raise UsageError(
                    f"{token.parent} on {platform.node()} is not the same folder as here: name one"
                    " on storage that all machines of the cluster share."
                )
        _log.setLevel(self.level)
        self.act()
        _begun = self.pool


@dataclass(frozen=True, slots=True)
class _Done:
    """What comes back from a worker: messages, and a result or the error that the user can mend.

    Errors come by value, since Ray would wrap them, and without their constructors, which may ask
    for more than a sentence.
    """

    told: list[tuple[str, int, str]]
    result: Any = None
    wrong: OSError | tuple[type[GazeguardError], str] | None = None


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append((record.name, record.levelno, record.getMessage()))


def _in_worker(start: _Start, work: Callable[..., Any], *args: Any, **kwargs: Any) -> _Done:
    collector = _Collector()
    _log.addHandler(collector)
    try:
        start.once()
        return _Done(collector.told, work(*args, **kwargs))
    except OSError as error:
        return _Done(collector.told, wrong=error)
    except GazeguardError as error:
        return _Done(collector.told, wrong=(type(error), str(error)))
    finally:
        _log.removeHandler(collector)


class RayPool(ThreadPoolExecutor):
    """Runs each call as a task of a connected cluster, and again when its process dies.

    A thread here waits for each task, so no more run at once than there are workers, whatever
    room the cluster has. What gazeguard logs in a worker is logged here when its call ends.

    Args:
        workers: how many, and what each gets.
        act: a worker process's first act.
        threads: of numerical libraries in each; the worker's cores when None.
        tokens: files that every worker has to see before it does anything.
    """

    def __init__(
        self,
        workers: Workers,
        act: Callable[[], None],
        threads: int | None = None,
        tokens: Sequence[Path] = (),
    ) -> None:
        import ray

        super().__init__(workers.count, "ray")
        self._start = _Start(
            secrets.token_hex(8), os.getcwd(), _log.getEffectiveLevel(), tuple(tokens), act
        )
        wanted = dict.fromkeys(_THREADS, str(threads or workers.cpus))
        self._task = ray.remote(_in_worker).options(
            **workers.resources,
            max_retries=0,  # Ray's own retries of a task that runs out of memory never end
            runtime_env={"env_vars": wanted},
        )
        self._running: set[Any] = set()
        self._lock = Lock()
        self._ended = False

    def share(self, value: Any) -> Any:
        """A handle of a value that many calls take as an argument: it travels once a machine."""
        import ray

        return ray.put(value)

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """A future of `fn(*args, **kwargs)` in a worker; arguments may be handles of `share`.

        Arguments arrive before the worker's first act, so they open no file and need no plugin
        just to be read. Its exceptions are those of the call, and `WorkerLost` when the process
        died each time.
        """
        return super().submit(self._waited, fn, *args, **kwargs)  # type: ignore[arg-type]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; with `cancel_futures` end the running ones too."""
        import ray

        if cancel_futures:
            with self._lock:
                self._ended = True
                for reference in self._running:
                    ray.cancel(reference, force=True)
        super().shutdown(wait, cancel_futures=cancel_futures)

    def _waited(self, work: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        from ray.exceptions import (
            NodeDiedError,
            OutOfMemoryError,
            TaskCancelledError,
            WorkerCrashedError,
        )

        memory = False
        for attempt in range(1 + _RETRIES):
            with self._lock:
                if self._ended:
                    break
                reference = self._task.remote(self._start, work, *args, **kwargs)
                self._running.add(reference)
            try:
                result: R = self._told(reference)
                return result
            except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
                memory = isinstance(error, OutOfMemoryError)
                if not self._ended and attempt < _RETRIES:
                    _log.warning(
                        "A Ray worker %s; its work is given to another.",
                        "ran out of memory" if memory else "died",
                    )
            except TaskCancelledError:  # the pool ends: nobody reads this result
                break
            finally:
                with self._lock:
                    self._running.discard(reference)
        raise WorkerLost(
            f"a Ray worker {'ran out of memory' if memory else 'died'} {1 + _RETRIES} times at it:"
            " use fewer --workers, or machines with more memory."
        )

    def _told(self, reference: Any) -> Any:
        import ray

        done: _Done = ray.get(reference)
        for name, level, message in done.told:
            logging.getLogger(name).log(level, "%s", message)
        if isinstance(done.wrong, OSError):
            raise done.wrong
        if done.wrong is not None:
            kind, sentence = done.wrong
            raise kind.__new__(kind, sentence)
        return done.result


@contextmanager
def ray_pool(
    workers: Workers,
    act: Callable[[], None],
    threads: int | None = None,
    shared: Sequence[Path] = (),
) -> Iterator[RayPool]:
    """A `RayPool` that ends with the block, and whose workers see the same `shared` folders.

    Raises:
        OSError: a folder cannot be written.
    """
    tokens = [folder.absolute() / f".shared-{secrets.token_hex(8)}" for folder in shared]
    try:
        for token in tokens:
            token.touch()
        pool = RayPool(workers, act, threads, tokens)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
    finally:
        for token in tokens:
            token.unlink(missing_ok=True)
