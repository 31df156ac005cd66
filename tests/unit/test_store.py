"""Blocks on disk: whole or absent, valid for one identity, damage noticed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import fsspec
import pandas as pd
import pyarrow as pa
import pytest

from gazeguard import files
from gazeguard.errors import UsageError
from gazeguard.files import write_bytes
from gazeguard.probe import store
from gazeguard.probe.folder import Folder
from gazeguard.probe.store import BlockStore, locked


def table(*rows: int) -> pa.Table:
    return pa.table({"row": list(rows)})


def opened(
    folder: Path | str, resume: bool = True, **identity: object
) -> tuple[BlockStore, list[str]]:
    made = BlockStore(folder, identity)
    return made, made.begin(resume=resume)


def read(made: BlockStore, start: int, stop: int) -> pa.Table | None:
    """A block, or None where it has to be measured."""
    return None if made.missing([(start, stop)]) else next(made.tables([(start, stop)]))


def test_a_block_comes_back_in_another_run(tmp_path: Path) -> None:
    first, changed = opened(tmp_path, model="a")
    assert changed == []
    assert read(first, 0, 2) is None
    first.write(0, 2, table(0, 1))
    assert read(first, 0, 2) == table(0, 1)
    second, changed = opened(tmp_path, model="a")
    assert changed == []
    assert read(second, 0, 2) == table(0, 1)
    assert read(second, 0, 3) is None, "another range is another block"


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({"model": "b", "size": 8}, ["model"]),
        ({"model": "a", "size": 4}, ["size"]),
        ({"model": "b", "size": 4}, ["model", "size"]),
        ({"model": "a"}, ["size"]),
    ],
)
def test_another_identity_drops_the_blocks_and_is_named(
    tmp_path: Path, now: dict[str, object], named: list[str]
) -> None:
    first, _ = opened(tmp_path, model="a", size=8)
    first.write(0, 1, table(0))
    second, changed = opened(tmp_path, **now)
    assert changed == named
    assert read(second, 0, 1) is None
    third, changed = opened(tmp_path, **now)
    assert changed == [], "the new identity took the old one's place"
    assert read(third, 0, 1) is None


def test_a_change_before_anything_was_measured_needs_no_words(tmp_path: Path) -> None:
    opened(tmp_path, model="a")
    _, changed = opened(tmp_path, model="b")
    assert changed == []
    again, _ = opened(tmp_path, model="b")
    again.write(0, 1, table(0))
    assert read(opened(tmp_path, model="b")[0], 0, 1) == table(0)


def test_without_resume_nothing_is_reused(tmp_path: Path) -> None:
    first, _ = opened(tmp_path, model="a")
    first.write(0, 1, table(0))
    second, changed = opened(tmp_path, resume=False, model="a")
    assert changed == []
    assert read(second, 0, 1) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"'])
def test_blocks_under_an_unreadable_marker_are_not_trusted(tmp_path: Path, content: str) -> None:
    first, _ = opened(tmp_path, model="a")
    first.write(0, 1, table(0))
    (tmp_path / "run.json").write_text(content)
    second, changed = opened(tmp_path, model="a")
    assert changed == ["run.json"]
    assert read(second, 0, 1) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_block_is_no_block(tmp_path: Path, damage: str) -> None:
    first, _ = opened(tmp_path, model="a")
    first.write(0, 100, table(*range(100)))
    (path,) = tmp_path.glob("rows-*.parquet")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-5]), "empty": b""}[damage])
    second, _ = opened(tmp_path, model="a")
    assert read(second, 0, 100) is None
    second.write(0, 100, table(*range(100)))
    assert read(second, 0, 100) == table(*range(100))


def test_equal_tables_make_equal_files(tmp_path: Path) -> None:
    assert store.parquet_bytes(table(1, 2)) == store.parquet_bytes(table(1, 2))


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_bytes(path, b"new")
    assert caught.value.filename == str(path), "the message must say which disk is full"
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    write_bytes(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    modes = {(tmp_path / name).stat().st_mode for name in ("ours", "plain")}
    assert len(modes) == 1, "a temporary file's private mode must not stay"


def test_a_folder_holds_one_run_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        locked(tmp_path / "work"),
        pytest.raises(UsageError, match="Another run"),
        locked(tmp_path / "work"),
    ):
        pass
    with locked(tmp_path / "work"):
        pass  # free again


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """A folder of fsspec's own file system in memory, which stands for an object store."""
    yield f"memory://{request.node.name}"
    fsspec.filesystem("memory").store.clear()


def test_blocks_behind_a_url_are_those_of_a_folder(memory: str, tmp_path: Path) -> None:
    for place in (memory, tmp_path):
        first, _ = opened(place, model="a")
        first.write(0, 2, table(0, 1))
        assert first.note("size", lambda: "8") == "8"
        again, changed = opened(place, model="a")
        assert changed == []
        assert read(again, 0, 2) == table(0, 1)
        assert again.note("size", lambda: "9") == "8", "what was noted stays"
        other, changed = opened(place, model="b")
        assert changed == ["model"]
        assert read(other, 0, 2) is None
        assert other.note("size", lambda: "9") == "9"
    here, there = Folder(tmp_path).names(), Folder(memory).names()
    assert here == there == ["run.json", "size.txt"]


def test_a_cut_upload_is_measured_again(memory: str) -> None:
    first, _ = opened(memory, model="a")
    first.write(0, 9, table(*range(9)))
    folder = Folder(memory)
    (name,) = (name for name in folder.names() if name.startswith("rows-"))
    folder.write(name, folder.read(name)[:-7])
    assert read(opened(memory, model="a")[0], 0, 9) is None
    assert name not in folder.names()


def test_a_block_that_changes_while_it_is_read_stops_the_run(tmp_path: Path) -> None:
    first, _ = opened(tmp_path, model="a")
    first.write(0, 2, table(0, 1))
    assert first.missing([(0, 2)]) == []
    (path,) = tmp_path.glob("rows-*.parquet")
    path.write_bytes(b"other")
    with pytest.raises(OSError, match="changed while it was read"):
        list(first.tables([(0, 2)]))


def test_slow_storage_is_read_several_blocks_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = opened(tmp_path, model="a")
    spans = [(i, i + 1) for i in range(12)]
    for start, stop in spans:
        made.write(start, stop, table(start))
    meet = threading.Barrier(store._READERS, timeout=20)  # nobody is through before all are there
    fast = Folder.read

    def slow(self: Folder, name: str) -> bytes:
        if name.startswith("rows-"):
            meet.wait()
        return fast(self, name)

    monkeypatch.setattr(Folder, "read", slow)
    assert [t["row"].to_pylist() for t in made.tables(spans)] == [[i] for i in range(12)]


@pytest.mark.parametrize("url", ["nothing://bucket/folder", "s3//:x://y"])
def test_an_unknown_protocol_is_one_sentence(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give a path or a URL"):
        Folder(url)


def test_every_block_can_be_read_by_other_tools(tmp_path: Path) -> None:
    made, _ = opened(tmp_path, model="a")
    made.write(0, 2, table(0, 1))
    made.write(2, 3, table(2))
    query = f"select count(*), max(row) from '{tmp_path}/rows-*.parquet'"
    assert duckdb.sql(query).fetchall() == [(3, 2)]
    assert pd.concat(map(pd.read_parquet, tmp_path.glob("rows-*.parquet")))["row"].sum() == 3
