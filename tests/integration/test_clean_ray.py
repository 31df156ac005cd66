"""`clean --ray`: the same result as in one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gazeguard.cleaning import CleanOutcome, clean, spread
from gazeguard.cleaning.measure import WORKER_DIED
from gazeguard.cleaning.reader import Here
from gazeguard.cli.main import run
from gazeguard.cluster import Ray
from gazeguard.errors import UsageError

from .conftest import MakeData
from .test_clean_resume import RESULTS

ray = pytest.importorskip("ray")

ROWS, BROKEN = 23, 9
SMALL = {"batch_size": 2, "block_rows": 4}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two workers on this machine for the whole module."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def data(make_data: MakeData) -> Path:
    return make_data(ROWS, broken=(BROKEN,))


@pytest.fixture(scope="module")
def whole(llava: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> CleanOutcome:
    """An undisturbed run of two workers, its blocks behind a URL beside the output folder."""
    out = tmp_path_factory.mktemp("ray") / "whole"
    url = f"file://{out}-blocks"
    return clean(llava, data, out, ray=Ray(workers=2), store=url, **SMALL)


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`dying(row, times)`: workers are killed that often when they get a block with that row."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def install(row: int, times: int) -> Path:
        blocks = Here.blocks

        def killed(self, spans, batch_size, rows):  # type: ignore[no-untyped-def]
            if any(row in range(*span) for span in spans):
                before = len(list(marks.iterdir()))
                if before < times:
                    (marks / f"{before}-{spans[0][0]}-{spans[0][1]}").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return blocks(self, spans, batch_size, rows)

        class Dying(spread.Worker):
            def _reader(self):  # type: ignore[no-untyped-def]
                Here.blocks = killed  # in the worker's process
                return super()._reader()

        # By value: a worker cannot import a class of a test.
        ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
        monkeypatch.setattr(spread, "Worker", Dying)
        return marks

    return install


def bytes_of(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


def test_the_same_as_in_one_process(
    whole: CleanOutcome, llava: Path, data: Path, tmp_path: Path
) -> None:
    here = clean(llava, data, tmp_path, **SMALL)
    assert whole.counts == here.counts
    assert whole.outcome is here.outcome
    for name in RESULTS[:4]:
        assert (whole.folder / name).read_bytes() == (tmp_path / name).read_bytes()
    np.testing.assert_array_equal(whole.profile.row, here.profile.row)
    for name, values in here.profile.signals.items():
        np.testing.assert_allclose(whole.profile.signals[name], values, atol=1e-5, rtol=0)
    assert whole.report.typical is not None
    assert whole.report.typical.pictures[0].heat is not None
    assert whole.report.provenance["data"] == here.report.provenance["data"]


def test_blocks_lie_behind_the_url(whole: CleanOutcome) -> None:
    blocks = sorted(whole.folder.with_name("whole-blocks").glob("rows-*.parquet"))
    assert len(blocks) == 6
    assert pq.read_table(blocks[0])["row"].to_pylist() == [0, 1, 2, 3]
    assert not list((whole.folder / ".work").glob("rows-*"))


def test_one_process_goes_on_where_workers_were(
    whole: CleanOutcome, llava: Path, data: Path, tmp_path: Path
) -> None:
    blocks = tmp_path / "blocks"
    shutil.copytree(whole.folder.with_name("whole-blocks"), blocks)
    next(blocks.glob("rows-000000004-*")).unlink()
    seen: list[int] = []
    options = SMALL | {"store": blocks, "progress": lambda done, total: seen.append(done)}
    clean(llava, data, tmp_path / "out", **options)
    assert seen[0] == ROWS - 4
    assert seen[-1] == ROWS


def test_a_killed_worker_changes_no_byte(
    whole: CleanOutcome, llava: Path, data: Path, tmp_path: Path, dying: Callable[..., Path]
) -> None:
    marks = dying(row=13, times=2)
    clean(llava, data, tmp_path / "out", ray=Ray(workers=1), **SMALL)
    assert len(list(marks.iterdir())) == 2
    assert bytes_of(tmp_path / "out") == bytes_of(whole.folder)


def test_a_row_that_always_kills_is_skipped_alone(
    llava: Path,
    data: Path,
    tmp_path: Path,
    decide: Callable[..., None],
    dying: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decide(3)
    monkeypatch.setattr(spread, "TRIES", 2)
    marks = dying(row=13, times=1000)
    found = clean(llava, data, tmp_path / "out", ray=Ray(workers=1), limit=16, **SMALL)
    assert found.counts == {
        "rows": 16,
        "kept": 13,
        "removed": 1,
        "suspected": 0,
        "skipped": 2,
        "text_only": 0,
    }
    skipped = [json.loads(x) for x in (tmp_path / "out" / "reasons.jsonl").open()]
    assert [(s["row"], s["reason"]) for s in skipped if s["row"] != BROKEN] == [(13, WORKER_DIED)]
    tried = Counter(path.name.split("-", 1)[1] for path in marks.iterdir())
    # The first death may look like that of the block before, which was not yet handed in.
    assert tried.pop("12-16") in (2, 3)
    assert tried == {"12-14": 1, "13-14": 2}
    assert [item.row for item in found.report.gallery] == [3]
    assert [(p.phrase, p.not_tried[:16]) for p in found.report.proofs] == [
        ("chosen", "fewer than 8 of ")
    ]


def test_a_workers_error_is_the_users_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["clean", str(tmp_path), str(data), "--out", str(tmp_path / "out"), "-q"]
    assert run([*command, "--workers", "1", "--ray"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("Error: ")
    assert "\n" not in said


def test_workers_of_another_version_are_refused(
    llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "__version__", "0")
    with pytest.raises(UsageError, match="same version on every machine"):
        clean(llava, data, tmp_path, ray=Ray(workers=1), **SMALL)
    assert not list((tmp_path / ".work").glob("rows-*"))
