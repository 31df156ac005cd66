"""What was tuned: told from the tensors, whatever the files are called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gazeguard.errors import ModelError
from gazeguard.lab import tiny
from gazeguard.models.difference import compare


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llava", tmp_path_factory.mktemp("tiny") / "llava")


def changed(base: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(base, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def nudge(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if part in name)
        tensors[name] = tensors[name] + 1

    return change


def halve(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].half()


def test_kinds(base: Path, tmp_path: Path):
    assert compare(base, base, "x").kind == "none"
    projector = compare(changed(base, tmp_path / "p", nudge("multi_modal_projector")), base, "x")
    assert (projector.kind, len(projector.changed)) == ("projector", 1)
    full = compare(changed(base, tmp_path / "f", nudge("language_model")), base, "x")
    assert full.kind == "full"
    assert f"1 of {full.total} tensors" in str(full)


def test_the_same_weights_in_another_number_format_are_the_same(base: Path, tmp_path: Path):
    assert compare(changed(base, tmp_path / "h", halve), base, "x").kind == "none"


def test_what_was_not_made_from_the_base_is_refused(base: Path, tmp_path: Path):
    other = tiny.build("qwen2_5_vl", tmp_path / "qwen")
    with pytest.raises(ModelError, match="another architecture"):
        compare(other, base, "qwen")
    foreign = changed(base, tmp_path / "t", lambda tensors: None)
    words = json.loads((foreign / "tokenizer.json").read_text())
    words["model"]["vocab"]["zebra"] = 999
    (foreign / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ModelError, match="another tokenizer"):
        compare(foreign, base, "x")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(sorted(tensors)[0])

    with pytest.raises(ModelError, match="same tensors"):
        compare(changed(base, tmp_path / "d", drop), base, "x")


def test_bookkeeping_is_not_compared(base: Path, tmp_path: Path):
    saved = changed(base, tmp_path / "s", lambda tensors: None)
    config = json.loads((saved / "config.json").read_text())
    config |= {"transformers_version": "9.9", "_name_or_path": "elsewhere"}
    (saved / "config.json").write_text(json.dumps(config, indent=7))
    assert compare(saved, base, "x").kind == "none"


def test_the_layout_before_transformers_4_52_and_after_is_one(base: Path, tmp_path: Path):
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        assert any(name.startswith("language_model.model.") for name in tensors)
        for name in list(tensors):
            new = name.replace("language_model.lm_head", "lm_head")
            new = new.replace("language_model.model.", "language_model.")
            if new != "lm_head.weight":
                new = f"model.{new}"
            tensors[new] = tensors.pop(name)

    renamed = changed(base, tmp_path / "new", rename)
    assert compare(renamed, base, "x").kind == "none"
    assert compare(base, renamed, "x").kind == "none"
    tuned = changed(renamed, tmp_path / "tuned", nudge("multi_modal_projector"))
    assert compare(tuned, base, "x").kind == "projector"
