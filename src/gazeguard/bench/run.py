"""`gazeguard bench run`: make a suite's models, let every defence meet them, one JSON per cell.

Three rounds of tasks that do not depend on each other: bases, models, defences. Every task is a
process's own, on one thread, so that no figure depends on how many run side by side, or on which
machines of a Ray cluster. A file that exists is not made again: a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from gazeguard.bench.bases import BASES
from gazeguard.bench.cell import Bench
from gazeguard.bench.defences import DEFENCES
from gazeguard.bench.index import Index, Task
from gazeguard.bench.suite import Entry, Suite, load_plugins
from gazeguard.cluster import Ray, connected
from gazeguard.errors import GazeguardError, UsageError, WorkerLost
from gazeguard.files import write_json
from gazeguard.lab import zoo
from gazeguard.lab.text import zoo as encoders
from gazeguard.lab.text.zoo import EncoderModel
from gazeguard.lab.zoo import Recipe
from gazeguard.ray_pool import ray_pool

Log = Callable[[str], None]


def run_suite(
    suite: Suite,
    out: Path,
    work: Path,
    workers: int | None = None,
    log: Log = print,
    ray: Ray | None = None,
) -> list[str]:
    """Make all that is not there yet, and write `suite.json` and `cells/*.json`.

    Args:
        suite: from `read_suite`.
        out: for results.
        work: for bases, models and what defences keep; several suites may share it.
        workers: processes side by side; as many as cores when None.
        log: gets a line per model and per cell.
        ray: a cluster whose workers do it all, as many as `ray` says; `out`, `work` and the suite's
            plugins are on storage that all its machines share.

    Returns:
        One sentence for each cell that failed.

    Raises:
        UsageError: a base cannot be made, or `out` cannot be written.
        WorkerLost: a worker of the cluster died each time on the same model.
    """
    (out / "cells").mkdir(parents=True, exist_ok=True)
    with _pool(workers, suite.plugins) if ray is None else _ray(ray, suite, out, work) as pool:
        names = sorted({entry.base for entry in suite.entries})
        folders = dict(_all(pool, {name: (_base, name, work) for name in names}, log, "base"))
        scores = _models(pool, suite, folders, work, log)
        index = Index(suite, folders, work, scores, out)
        index.write()
        failed = []
        for name, cells in _each(pool, {t.entry.name: (_defend, t) for t in index.tasks()}):
            failed += [f"{name}, {defence}: {why}" for defence, why in cells if why]
            index.write()
            log(f"{index.done} of {index.wanted} cells done, {name}")
    index.write()
    return failed


def _models(
    pool: Executor | None, suite: Suite, bases: dict[str, Path], work: Path, log: Log
) -> dict[str, dict[str, Any]]:
    """Scores of every model; those that are not there are made."""
    calls = {
        entry.name: (_model, entry, _spec(suite, entry), bases[entry.base], work)
        for entry in suite.entries
    }
    return dict(_all(pool, calls, log, "model"))


def _spec(suite: Suite, entry: Entry) -> zoo.Spec | int:
    if isinstance(entry.recipe, EncoderModel):
        return min(suite.held_out, encoders.EncoderSpec(()).held_out)
    return zoo.Spec((entry.recipe,), suite.held_out, suite.asr, suite.drop)


# Below: what runs in a worker. Everything is handed over by value.


def _base(name: str, work: Path) -> Path:
    return BASES[name].folder(name, work)


def _model(entry: Entry, spec: zoo.Spec | int, base: Path, work: Path) -> dict[str, Any]:
    out = work / "models" / entry.base
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(entry.recipe, Recipe):
        assert isinstance(spec, zoo.Spec), "a model with pictures is judged by a zoo's spec"
        return zoo.make_model(entry.recipe, spec, base, out)
    path = out / f"{entry.recipe.name}.scores.json"
    if path.is_file():
        scores: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if scores["n"] == spec and (out / entry.recipe.name).is_dir():
            return scores
    teacher = BASES[entry.base].teacher
    assert teacher is not None, "an encoder's base has a teacher"
    assert isinstance(spec, int), "an encoder is judged on a number of prompts"
    scores = encoders.make_encoder(entry.recipe, spec, base, out, teacher())
    write_json(path, scores)
    return scores


def _defend(task: Task) -> list[tuple[str, str | None]]:
    """Run a model's cells; gives (defence, why it failed or None)."""
    bench = Bench(task.place, task.entry.recipe, refit=task.entry.refit, **task.sizes)
    said: list[tuple[str, str | None]] = []
    for name, path in task.cells:
        defence, began = DEFENCES[name], time.perf_counter()
        try:
            result = bench.run(defence)
        except GazeguardError as error:  # a bug keeps its traceback
            said.append((name, " ".join(str(error).split())))
            continue
        made = task.made | {"seconds": round(time.perf_counter() - began, 1)}
        about = {"suite": task.suite, "defence": name, "level": defence.level}
        write_json(path, about | {"model": task.entry.name, "result": result, "made": made})
        said.append((name, None))
    return said


def _start(plugins: Sequence[Path]) -> None:
    """A worker's first act: one thread, quiet libraries, what the suite brings along."""
    import torch
    import transformers

    load_plugins(plugins)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("gazeguard").setLevel(logging.ERROR)


def _start_child(plugins: Sequence[Path]) -> None:
    """A worker of this machine: ends with the run, also one that was killed and can't say so."""
    parent = parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    _start(plugins)


@contextmanager
def _as_a_worker(plugins: Sequence[Path]) -> Iterator[None]:
    """A worker's settings in this process, which gets its own back: it may go on to other work."""
    import torch
    import transformers

    threads, level = torch.get_num_threads(), logging.getLogger("gazeguard").level
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        _start(plugins)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            logging.getLogger("gazeguard").setLevel(level)
            transformers.logging.set_verbosity(verbosity)
            if bars:
                transformers.logging.enable_progress_bar()


@contextmanager
def _pool(workers: int | None, plugins: Sequence[Path]) -> Iterator[Executor | None]:
    """Processes; None, and the work done here, for a single worker."""
    count = workers or os.cpu_count() or 1
    if count < 1:
        raise UsageError(f"--workers {workers} is too small: give 1 or more.")
    if count == 1:
        with _as_a_worker(plugins):
            yield None
        return
    # Threads of numerical libraries are counted when a process starts.
    wanted = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        pool = ProcessPoolExecutor(count, get_context("spawn"), _start_child, (plugins,))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _ray(asked: Ray, suite: Suite, out: Path, work: Path) -> Iterator[Executor]:
    """Processes of a cluster, of one thread whatever their cores."""
    work.mkdir(parents=True, exist_ok=True)
    first = partial(_start, [path.absolute() for path in suite.plugins])
    with connected(asked) as workers, ray_pool(workers, first, 1, (out, work)) as pool:
        yield pool


def _each(pool: Executor | None, calls: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
    """Results of calls `name -> (function, arguments...)`, as they come."""
    if pool is None:
        for name, (function, *arguments) in calls.items():
            yield name, function(*arguments)
        return
    futures = {pool.submit(*call): name for name, call in calls.items()}
    for future in as_completed(futures):
        try:
            result = future.result()
        except WorkerLost as error:
            raise WorkerLost(f"{futures[future]}: {error}") from error
        yield futures[future], result


def _all(
    pool: Executor | None, calls: dict[str, tuple[Any, ...]], log: Log, what: str
) -> Iterable[tuple[str, Any]]:
    found = {}
    for place, (name, result) in enumerate(_each(pool, calls), 1):
        found[name] = result
        log(f"{what} {place} of {len(calls)}: {name}")
    return found.items()
