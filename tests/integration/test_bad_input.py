"""Every bad input ends in one sentence with its cure, the right exit code, and no traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gazeguard import files
from gazeguard.cleaning import measure
from gazeguard.cli.main import run
from gazeguard.lab import tiny
from gazeguard.probe import store

from .conftest import MakeData


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What the run that just ended said last, after checking that it is one sentence."""

    def last_line() -> str:
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        line = printed.err.strip().splitlines()[-1]
        assert line.startswith("Error: "), printed.err
        assert line.endswith("."), "the sentence ends with its cure"
        assert printed.out == ""
        return line

    return last_line


def args(model: Path | str, data: Path | str, out: Path, *options: str) -> list[str]:
    return ["clean", str(model), str(data), "--out", str(out), *options]


def test_missing_model_folder(make_data: MakeData, tmp_path: Path, said: Callable[[], str]) -> None:
    assert run(args(tmp_path / "nowhere", make_data(2), tmp_path / "out")) == 2
    assert "nowhere" in said()


def test_missing_data(llava: Path, tmp_path: Path, said: Callable[[], str]) -> None:
    assert run(args(llava, tmp_path / "nowhere.json", tmp_path / "out")) == 2
    assert "nowhere.json does not exist" in said()
    assert not (tmp_path / "out").exists(), "nothing is made for data that is not there"


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00\x01"])
def test_empty_or_unreadable_data(
    llava: Path, tmp_path: Path, said: Callable[[], str], content: str
) -> None:
    data = tmp_path / "data.json"
    data.write_text(content)
    assert run(args(llava, data, tmp_path / "out")) == 2
    assert "data.json" in said()


def test_model_of_another_kind(
    make_data: MakeData, tmp_path: Path, said: Callable[[], str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    assert run(args(tmp_path / "text", make_data(2), tmp_path / "out")) == 2
    assert "text-only" in said()


def test_model_without_processor(
    llava: Path, make_data: MakeData, tmp_path: Path, said: Callable[[], str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llava / name, bare / name)
    assert run(args(bare, make_data(2), tmp_path / "out")) == 2
    said()


def test_adapter_of_another_base(
    llava: Path, make_data: MakeData, tmp_path: Path, said: Callable[[], str]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    other = tiny.build("qwen2_5_vl", tmp_path / "qwen")
    foreign = AutoModelForImageTextToText.from_pretrained(other)
    adapted = get_peft_model(foreign, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = ("--adapter", str(tmp_path / "adapter"))
    assert run(args(llava, make_data(2), tmp_path / "out", *adapter)) == 2
    assert "adapter" in said()


def nan_model(llava: Path, folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llava, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.1.self_attn.q_proj.weight"))
    weights[name].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_weights_are_inconclusive_and_lose_no_row(
    llava: Path, make_data: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make_data(6, broken=(1,)), tmp_path / "out"
    assert run(args(nan_model(llava, tmp_path / "nan"), data, out)) == 3
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    assert "not finite" in printed.out
    report = json.loads((out / "report.json").read_text())
    assert report["outcome"] == "inconclusive"
    assert report["counts"] == {
        "rows": 6,
        "kept": 5,
        "removed": 0,
        "suspected": 0,
        "skipped": 1,
        "text_only": 0,
    }
    rows = json.loads(data.read_text())
    assert json.loads((out / "kept.json").read_text()) == rows[:1] + rows[2:]
    assert run(args(tmp_path / "nan", data, out, "-q", "--fail-on", "flagged")) == 0


def test_only_unreadable_rows_are_inconclusive(
    llava: Path, make_data: MakeData, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(args(llava, make_data(3, broken=(0, 1, 2)), out, "-q")) == 3
    report = json.loads((out / "report.json").read_text())
    assert report["counts"] == {
        "rows": 3,
        "kept": 0,
        "removed": 0,
        "suspected": 0,
        "skipped": 3,
        "text_only": 0,
    }
    assert len((out / "reasons.jsonl").read_text().splitlines()) == 3


def test_one_row_is_inconclusive(llava: Path, make_data: MakeData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(args(llava, make_data(1), out, "-q")) == 3
    assert len(json.loads((out / "kept.json").read_text())) == 1


@pytest.mark.parametrize("rule", ["robust", "paper"])
def test_identical_rows_remove_nothing(
    llava: Path, make_data: MakeData, tmp_path: Path, rule: str
) -> None:
    out = tmp_path / "out"
    code = run(args(llava, make_data(60, same=True), out, "-q", "--rule", rule))
    assert code in (0, 3), "rows that are all alike cannot be told apart"
    assert json.loads((out / "report.json").read_text())["counts"]["kept"] == 60


def test_output_folder_that_is_a_file(
    llava: Path, make_data: MakeData, tmp_path: Path, said: Callable[[], str]
) -> None:
    (tmp_path / "out").write_text("")
    assert run(args(llava, make_data(2), tmp_path / "out")) == 2
    assert "choose another" in said()


def test_output_folder_that_cannot_be_written(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    said: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    data = make_data(2)
    monkeypatch.setattr(Path, "mkdir", refuse)  # the tests may run as root, whom nothing stops
    assert run(args(llava, data, tmp_path / "out")) == 2
    assert "Permission denied" in said()


def test_output_folder_inside_the_data(
    llava: Path, make_data: MakeData, tmp_path: Path, said: Callable[[], str]
) -> None:
    data = tmp_path / "set"
    data.mkdir()
    shutil.copy(make_data(1).parent / "0.png", data / "0.png")
    (data / "metadata.jsonl").write_text(
        json.dumps({"file_name": "0.png", "messages": [{"role": "user", "content": "?"}]}) + "\n"
    )
    assert run(args(llava, data, data / "out")) == 2
    assert "inside the data set" in said()


def test_full_disk_while_measuring_keeps_what_was_saved(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    said: Callable[[], str],
    decide: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decide()
    data, out = make_data(6), tmp_path / "out"
    saves = []
    replace = os.replace

    def full_at_the_second(source: str, target: Path) -> None:
        if "rows-" in str(target):
            saves.append(target)
            if len(saves) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    options = ("--batch-size", "2", "--block-rows", "2")
    monkeypatch.setattr(files.os, "replace", full_at_the_second)
    assert run(args(llava, data, out, *options)) == 2
    assert "No space left" in (line := said())
    assert "free some space" in line
    assert len(list((out / ".work").iterdir())) == 3, "one block, run.json and the lock; no rest"
    assert run(args(llava, data, out, "-q", *options)) == 0
    assert len(saves) == 4, "the block that was saved is not measured again"


def test_full_disk_while_writing_the_results_leaves_no_report(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    said: Callable[[], str],
    decide: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decide()
    data, out = make_data(4), tmp_path / "out"
    assert run(args(llava, data, out, "-q")) == 0

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr("gazeguard.cleaning.outputs.write_bytes", full)
        assert run(args(llava, data, out)) == 2
    assert "free some space" in said()
    assert run(args(llava, data, out, "-q")) == 0
    assert (out / "report.json").exists()


def test_two_runs_at_once_in_one_folder(
    llava: Path, make_data: MakeData, tmp_path: Path, said: Callable[[], str]
) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    with store.locked(out / ".work"):
        assert run(args(llava, make_data(2), out)) == 2
    assert "Another run" in said()


def test_unknown_device(
    llava: Path, make_data: MakeData, tmp_path: Path, said: Callable[[], str]
) -> None:
    assert run(args(llava, make_data(2), tmp_path / "out", "--device", "abacus")) == 2
    assert "abacus" in said()


def test_data_that_changes_under_way(
    llava: Path,
    make_data: MakeData,
    tmp_path: Path,
    said: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = measure._measured
    monkeypatch.setattr(measure, "_measured", lambda *a: (rows[:-1] for rows in blocks(*a)))
    assert run(args(llava, make_data(3), tmp_path / "out")) == 2
    assert "changed while it was read" in said()


def test_a_bug_keeps_its_traceback_and_is_not_taken_for_flagged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from gazeguard.cli import main as entry

    def broken() -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(entry, "run", broken)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2, "1 would mean: poisoned rows were found"
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err
