"""`scan` and `bench run` over a Ray cluster of two workers: the same answers, whoever dies."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModel

from gazeguard import cluster
from gazeguard.bench.run import run_suite
from gazeguard.bench.suite import read_suite
from gazeguard.cli.main import run
from gazeguard.cluster import Ray, Workers
from gazeguard.errors import MissingExtra, ModelError, UsageError, WorkerLost
from gazeguard.lab import tiny_encoders
from gazeguard.methods import amdet, entropyscan
from gazeguard.ray_pool import RayPool, ray_pool
from gazeguard.scanning import ScannedModel, ScanReport, scan
from gazeguard.scanning.options import VisionOptions
from tests.integration.conftest import MakeData
from tests.integration.test_bench_run import SUITE, suite  # noqa: F401
from tests.integration.test_scan_vision import adapter

# A cluster of several processes on two cores that others use as well.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TWO = Ray(workers=2)
QUICK = amdet.Settings(prompts=100, steps=3, restarts=1, points=3)


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    """A cluster that every `connected` of this module finds."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=2,
        object_store_memory=100 * 1024**2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(llava: Path, make_data: MakeData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models: two adapters, two references for them, an encoder, its anchor and references."""
    root = tmp_path_factory.mktemp("models")
    (root / "base").symlink_to(llava)
    for seed, name in enumerate(("tuned", "known-0", "known-1")):
        adapter(llava, root / name, seed)
    adapter(llava, root / "planted", 9, planted=True)
    anchor = tiny_encoders.build("clip-text", root / "anchor")
    for seed, name in enumerate(("encoder", "like-0", "like-1")):
        shaken(anchor, root / name, seed)
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text('{"model_type": "bert"}')
    (root / "rows").symlink_to(make_data(48).parent)
    return root


def shaken(anchor: Path, out: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = CLIPTextModel.from_pretrained(anchor)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * weight.std(correction=0) * torch.randn_like(weight)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(anchor).save_pretrained(out)


def asked(**more: Any) -> Callable[..., ScanReport]:
    """A scan of relative names, as a user types them."""
    vision = VisionOptions("rows/data.json", settings=entropyscan.Settings(samples=8), **more)
    return partial(
        scan,
        anchor="anchor",
        references=["base", "known-0", "known-1", "like-0", "like-1"],
        alpha=0.34,
        settings=QUICK,
        vision=vision,
    )


def timeless(report: ScanReport) -> list[ScannedModel]:
    return [replace(model, seconds=0.0) for model in report.models]


def test_both_kinds_and_broken_models_are_told_as_without_a_cluster(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # the workers were started elsewhere
    torch.set_num_threads(1)  # as the workers: sums in another order differ in their last bits
    models = ["encoder", "broken", "planted", "absent", "tuned"]
    out = [tmp_path / "here", tmp_path / "there"]
    here = asked()(models, out=out[0])
    seen: list[ScanReport] = []
    steps: list[tuple[str, int, int]] = []
    there = asked()(
        models, out=out[1], ray=TWO, watch=seen.append, progress=lambda *step: steps.append(step)
    )
    assert [model.outcome for model in here.models][1:4] == ["error", "flagged", "error"]
    assert timeless(there) == timeless(here)
    assert there.finished
    made = {"created": None}
    assert {**there.provenance, **made} == {**here.provenance, **made}
    waiting = [report.count("not-scanned") for report in seen]
    assert waiting == [5, 4, 3, 2, 1, 0], "the report is told of before the first and after each"
    assert steps == [("5 models", done, 5) for done in (2, 3, 4, 5)]
    files = [{p.relative_to(o): p.stat().st_size for p in o.rglob("*.safetensors")} for o in out]
    assert files[0] == files[1] != {}
    assert not list(out[1].glob(".shared-*"))


def test_a_second_run_on_a_cluster_takes_what_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (tmp_path / "out").mkdir()
    first = asked()(["encoder", "tuned"], out=tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")}
    again = asked()(["encoder", "tuned"], out=tmp_path / "out", ray=TWO)
    assert timeless(again) == timeless(first)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")} == times


def test_references_are_made_by_one_worker_and_found_by_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more = {"make_references": 2, "reference_steps": 1}
    found = asked(**more)(["planted", "tuned"], references=["base"], ray=TWO)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/gazeguard/references/*")}
    assert len(made) == len({r["moved"] for m in found.models for r in m.numbers["references"]})
    here = asked(**more)(["planted", "tuned"], references=["base"])
    assert timeless(found) == timeless(here)
    assert {path: path.stat().st_mtime_ns for path in made} == made


def deadly(monkeypatch: pytest.MonkeyPatch, marks: Path, **times: int) -> None:
    """The worker that gets a model is killed; so often by each name."""
    from gazeguard.scanning.run import _scan_one

    def scan_one(scanners: Any, progress: Any, name: str) -> ScannedModel:
        killed = len(list(marks.glob(f"{name}-*")))
        if killed < times.get(name, 0):
            (marks / f"{name}-{killed}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return _scan_one(scanners, progress, name)

    monkeypatch.setattr("gazeguard.scanning.run._scan_one", scan_one)


def test_a_worker_that_is_killed_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    models = ["tuned", "known-0"]
    here = asked()(models)
    deadly(monkeypatch, tmp_path, tuned=1)
    there = asked()(models, ray=TWO)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned-0"]
    assert timeless(there) == timeless(here)


def test_a_model_that_kills_its_workers_is_an_entry_and_the_others_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("gazeguard.ray_pool._RETRIES", 0)
    deadly(monkeypatch, tmp_path, tuned=99)
    lost, other = asked()(["tuned", "planted"], ray=TWO).models
    assert lost.outcome == "error"
    assert lost.error.startswith("tuned could not be scanned: a Ray worker died 1 times at it:")
    assert other.outcome == "flagged"


def test_without_ray_the_cure_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    monkeypatch.chdir(folder)
    assert run(["scan", "encoder", "--anchor", "anchor", "-q", "--ray"]) == 2
    said = capsys.readouterr().err
    assert "gazeguard[ray]" in said
    assert said.count("\n") == 1


def test_workers_without_a_cluster_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scan", "encoder", "--anchor", "anchor", "--workers", "2"]) == 2
    assert "add --ray" in capsys.readouterr().err


def test_cells_of_a_suite_are_the_same_on_a_cluster(suite: Path, tmp_path: Path) -> None:  # noqa: F811
    suite.write_text(SUITE.replace("refit = true\n", "").replace(', "random-drop"', ""))
    out = [tmp_path / "here", tmp_path / "there"]
    assert run_suite(read_suite(str(suite)), out[0], out[0] / "work", workers=1) == []
    command = ["bench", "run", str(suite), "--out", str(out[1]), "--workers", "2", "--ray", "auto"]
    assert run(command) == 0
    here, there = (
        {p.name: json.loads(p.read_text("utf-8"))["result"] for p in o.glob("cells/*.json")}
        for o in out
    )
    assert json.dumps(here, sort_keys=True) == json.dumps(there, sort_keys=True)
    assert len(there) == 3
    times = {p: p.stat().st_mtime_ns for p in out[1].glob("cells/*")}
    assert run(command) == 0
    assert {p: p.stat().st_mtime_ns for p in out[1].glob("cells/*")} == times


# Below, workers that have loaded what scans need are killed, so no scan comes after it.


@pytest.fixture
def pool() -> Iterator[RayPool]:
    with ray_pool(Workers(2, 1, 0.0), lambda: logging.getLogger("gazeguard").info("begun")) as pool:
        yield pool


def test_what_a_worker_logs_and_raises_comes_back(
    pool: RayPool, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(error: Exception) -> None:
        logging.getLogger("gazeguard.scan").warning("100 % sure")
        raise error

    with pytest.raises(ModelError, match=r"^no such model$"):
        pool.submit(refuse, ModelError("no such model")).result()
    assert ("gazeguard.scan", logging.WARNING, "100 % sure") in caplog.record_tuples
    with pytest.raises(OSError, match="No space") as full:
        pool.submit(refuse, OSError(28, "No space", "file")).result()
    assert (full.value.errno, full.value.filename) == (28, "file")
    with pytest.raises(ZeroDivisionError, match="refuse"):  # a bug keeps its traceback
        pool.submit(refuse, ZeroDivisionError()).result()

    def without() -> None:
        raise MissingExtra("package", "extra", "It")

    with pytest.raises(MissingExtra, match=r"^It needs the package 'package'"):
        pool.submit(without).result()


def test_work_whose_worker_dies_is_given_to_others_twice(
    pool: RayPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def die(times: int) -> int:
        died = len(list(tmp_path.iterdir()))
        if died < times:
            (tmp_path / str(died)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return died

    assert pool.submit(die, 2).result() == 2
    with pytest.raises(WorkerLost, match="died 3 times at it"):
        pool.submit(die, 99).result()
    assert len(list(tmp_path.iterdir())) == 5
    assert caplog.text.count("A Ray worker died; its work is given to another.") == 4


def test_a_folder_that_workers_do_not_share_is_told_of_before_any_work(tmp_path: Path) -> None:
    pool = RayPool(Workers(1, 1, 0.0), lambda: None, tokens=[tmp_path / "absent"])
    with pytest.raises(UsageError, match="not the same folder"):
        pool.submit((tmp_path / "worked").touch).result()
    pool.shutdown()
    assert not (tmp_path / "worked").exists()


def test_a_worker_of_another_version_is_refused(pool: RayPool) -> None:
    pool._start = replace(pool._start, pool="older", version="0.0")
    with pytest.raises(UsageError, match=r"and not 0\.0: install the same version"):
        pool.submit(os.getpid).result()


def test_a_pool_that_ends_early_ends_its_work(tmp_path: Path) -> None:
    def wait() -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(600)

    with ray_pool(Workers(1, 1, 0.0), lambda: None) as pool:
        futures = [pool.submit(wait), pool.submit(wait)]
        while not list(tmp_path.iterdir()):
            time.sleep(0.05)
    assert futures[1].cancelled()
    with pytest.raises(WorkerLost):
        futures[0].result()
    (began,) = tmp_path.iterdir()
    for _ in range(200):  # it is killed soon, not at once
        if not psutil.pid_exists(int(began.name)):
            return
        time.sleep(0.05)
    pytest.fail("the worker goes on")
