"""Killed, interrupted and repeated runs: nothing is measured twice, nothing differs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gazeguard.cleaning import clean, measure
from gazeguard.cli.main import run

from .conftest import MakeData

RESULTS = (
    "kept.json",
    "removed.json",
    "skipped.json",
    "reasons.jsonl",
    "verdicts.parquet",
    "profile.parquet",
)

# Kills its own process inside the third save: the block is written under its temporary name only.
KILLED_WHILE_SAVING = """
import os, signal, sys
from gazeguard.probe import store
replace, saves = os.replace, []
def kill_at_the_third(source, target):
    if "rows-" in str(target):
        saves.append(target)
        if len(saves) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)
os.replace = kill_at_the_third
from gazeguard.cli.main import main
sys.argv[0] = "gazeguard"
main()
"""


def blocks(out: Path) -> list[str]:
    return sorted(path.name for path in (out / ".work").glob("rows-*.parquet"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the forward passes that measure rows."""
    sizes: list[int] = []
    attend = measure.attend

    def counted(target, encoded, **options):  # type: ignore[no-untyped-def]
        sizes.append(len(encoded.sample_id))
        return attend(target, encoded, **options)

    monkeypatch.setattr(measure, "attend", counted)
    return sizes


def test_sigkill_then_the_same_command_gives_the_same_bytes(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    decide: Callable[..., None],
    measured: list[int],
) -> None:
    data, out, whole = make_data(23, broken=(9,)), tmp_path / "out", tmp_path / "whole"
    options = ["--batch-size", "2", "--block-rows", "4", "-q"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, "clean", str(llava), str(data)]
        + ["--out", str(out), *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -9, killed.stderr
    assert len(blocks(out)) == 2, "two blocks were saved before the kill"
    assert list((out / ".work").glob(".rows-*")), "the third is there under its temporary name"
    assert not (out / "report.json").exists()

    decide(3)
    assert run(["clean", str(llava), str(data), "--out", str(out), *options]) == 1
    assert sum(measured) == 23 - 8 - 1, "rows of saved blocks are not measured again"
    assert not list((out / ".work").glob(".rows-*")), "what the kill left behind is gone"

    assert run(["clean", str(llava), str(data), "--out", str(whole), *options]) == 1
    for name in RESULTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"


def test_interrupt_says_so_and_can_be_resumed(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    decide: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decide()
    data, out = make_data(10), tmp_path / "out"
    args = ["clean", str(llava), str(data), "--out", str(out)]
    args += ["--batch-size", "2", "--block-rows", "2"]
    attend, calls = measure.attend, []

    def interrupted(target, encoded, **options):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return attend(target, encoded, **options)

    monkeypatch.setattr(measure, "attend", interrupted)
    assert run(args) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("Interrupted")
    assert "run the same command again" in last
    assert len(blocks(out)) == 3
    assert run(args) == 0
    assert len(calls) == 4 + 2, "only the two blocks that were missing are measured"
    assert "6 were measured before" in capsys.readouterr().err


def test_a_finished_run_is_judged_again_without_measuring(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    decide: Callable[..., None],
    measured: list[int],
) -> None:
    data, out = make_data(6), tmp_path / "out"
    decide(1)
    clean(llava, data, out)
    measured.clear()
    decide(2, 3)
    again = clean(llava, data, out, rule="paper", seed=5)
    assert measured == []
    assert again.counts["removed"] == 2


@pytest.mark.parametrize("change", ["data", "option", "model", "no-resume"])
def test_what_changed_is_named_and_measured_afresh(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    decide: Callable[..., None],
    measured: list[int],
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    from gazeguard.lab import tiny

    decide()
    data, out, model = make_data(5), tmp_path / "out", llava
    assert run(["clean", str(model), str(data), "--out", str(out)]) == 0
    measured.clear()
    capsys.readouterr()
    options, named = [], ""
    if change == "data":
        rows = json.loads(data.read_text())
        rows[3]["conversations"][1]["value"] = "blue"
        data.write_text(json.dumps(rows))
        named = "data"
    elif change == "option":
        options, named = ["--batch-size", "3"], "batch size"
    elif change == "model":
        model, named = tiny.build("llava", tmp_path / "other", seed=1), "model"
    else:
        options = ["--no-resume"]
    assert run(["clean", str(model), str(data), "--out", str(out), *options]) == 0
    assert sum(measured) == 5, "every row is measured again"
    said = [line for line in capsys.readouterr().err.splitlines() if "starting afresh" in line]
    assert len(said) == (0 if change == "no-resume" else 1)
    assert all(named in line for line in said)


@pytest.mark.parametrize("batch_size", [2, None])
def test_a_damaged_block_is_measured_again(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    decide: Callable[..., None],
    measured: list[int],
    batch_size: int | None,
) -> None:
    decide()
    data, out = make_data(8), tmp_path / "out"
    clean(llava, data, out, batch_size=batch_size, block_rows=2)
    before = {name: (out / name).read_bytes() for name in RESULTS}
    block = sorted((out / ".work").glob("rows-*.parquet"))[1]
    damaged = bytearray(block.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    block.write_bytes(damaged)
    measured.clear()
    clean(llava, data, out, batch_size=batch_size, block_rows=2)
    assert measured == [2]
    assert {name: (out / name).read_bytes() for name in RESULTS} == before


def test_an_earlier_runs_files_are_not_mixed_with_a_later_ones(
    llava: Path, make_data: MakeData, tmp_path: Path, decide: Callable[..., None]
) -> None:
    decide()
    data, out = make_data(4), tmp_path / "out"
    clean(llava, data, out)
    (out / "notes.txt").write_text("the user's own")
    lines = tmp_path / "lines.jsonl"
    for row in json.loads(data.read_text()):
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        turns = [asked, {"role": "assistant", "content": "red"}]
        with lines.open("a") as handle:
            handle.write(json.dumps({"images": [row["image"]], "messages": turns}) + "\n")
    clean(llava, lines, out, images=data.parent)
    assert not (out / "kept.json").exists(), "the other format's file of the run before is gone"
    assert (out / "kept.jsonl").read_bytes() == lines.read_bytes()
    assert (out / "notes.txt").exists(), "files of others stay"


def test_the_batch_size_that_auto_found_is_kept(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    measured: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, options = make_data(16, broken=(0,)), ["--batch-size", "auto", "-q"]
    monkeypatch.setattr("gazeguard.cleaning.fitting.LARGEST", 4)
    run(["clean", str(llava), str(data), "--out", str(tmp_path), "--limit", "1", *options])
    kept = (tmp_path / ".work" / "auto.txt").read_text()
    assert measured[:2] == [1, 1], "tried twice: the first time is not like the others"
    (tmp_path / ".work" / "auto.txt").write_text("3")
    measured.clear()
    run(["clean", str(llava), str(data), "--out", str(tmp_path), *options])
    assert kept in ("1", "2", "4")
    assert measured == [3] * 5


def test_a_batch_size_is_auto_or_a_number(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--batch-size", "all"]
    assert run(["clean", str(llava), "data", "--out", str(tmp_path), *wrong]) == 2
    assert "neither auto nor 1 or more" in capsys.readouterr().err
