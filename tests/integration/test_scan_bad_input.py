"""Text encoders, anchors and prompts that cannot be used: one sentence, the right exit code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gazeguard.cli.main import run
from gazeguard.lab import tiny_encoders

QUICK = ["--limit=120", "--steps=2", "--points=3", "--restarts=1", "-q"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoders.build("clip", tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def copy(clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip, tmp_path / "copy"))


@pytest.fixture
def refused(clip: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Scan, expect an exit code, and give the one line on stderr."""

    def scan(model: Path | str, *options: str, code: int = 2, anchor: Path | str = clip) -> str:
        capsys.readouterr()  # what writing the model said
        assert run(["scan", str(model), f"--anchor={anchor}", *QUICK, *options]) == code
        error = capsys.readouterr().err
        assert error.startswith("Error: "), error
        assert error.count("\n") == 1, error
        return error

    return scan


def spoil(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["text_model.final_layer_norm.weight"][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})


def test_an_encoder_of_images(tmp_path: Path, refused: Callable[..., str]):
    size = dict.fromkeys(("hidden_size", "intermediate_size"), 16)
    config = transformers.CLIPVisionConfig(**size, num_hidden_layers=1, num_attention_heads=1)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "vision")
    assert "sees images only" in refused(tmp_path / "vision")


def test_no_tokenizer(copy: Path, refused: Callable[..., str]):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(copy)


def test_an_anchor_of_another_width(tmp_path: Path, refused: Callable[..., str], clip: Path):
    config = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=260,
    )
    narrow = tmp_path / "narrow"
    transformers.CLIPTextModel(config).save_pretrained(narrow)
    tiny_encoders.tokenizer(77).save_pretrained(narrow)
    assert "embeddings of width 16" in refused(clip, anchor=narrow)


def test_an_anchor_that_is_not_there(clip: Path, refused: Callable[..., str]):
    assert "check the path" in refused(clip, anchor="./absent")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "holds no prompt"),
        (b"\n \n\t\n", "holds no prompt"),
        (b"a cat\0a dog", "not a text file"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not a text file"),
    ],
)
def test_prompts_that_are_none(
    content: bytes, why: str, clip: Path, tmp_path: Path, refused: Callable[..., str]
):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert why in refused(clip, f"--prompts={tmp_path / 'prompts.txt'}")


def test_prompts_that_are_not_there(clip: Path, tmp_path: Path, refused: Callable[..., str]):
    assert "cannot be read" in refused(clip, f"--prompts={tmp_path / 'absent.txt'}")
    assert "cannot be read" in refused(clip, f"--prompts={tmp_path}")


def test_prompts_longer_than_the_encoder_are_cut_and_told_of(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    long = "\n".join(f"{i} " + "a very long prompt " * 20 for i in range(120))
    (tmp_path / "prompts.txt").write_text(long)
    quick = [option for option in QUICK if option != "-q"]
    asked = [f"--anchor={clip}", f"--prompts={tmp_path / 'prompts.txt'}", *quick]
    assert run(["scan", str(clip), *asked]) == 0
    assert "120 prompts are longer than the 77 tokens" in capsys.readouterr().out


def test_weights_that_are_nan_are_undecided(
    copy: Path, clip: Path, capsys: pytest.CaptureFixture[str]
):
    spoil(copy)
    quick = [option for option in QUICK if option != "-q"]
    assert run(["scan", str(copy), f"--anchor={clip}", *quick]) == 3
    assert "not finite in 1 of " in capsys.readouterr().out


def test_an_anchor_with_nan_weights(copy: Path, clip: Path, refused: Callable[..., str]):
    spoil(copy)
    assert "not finite" in refused(clip, anchor=copy, code=3)


def test_pickled_weights(copy: Path, refused: Callable[..., str]):
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    assert "pickled weights" in refused(copy)
    assert "is a pickle" in refused(copy / "pytorch_model.bin")


def test_images_that_are_not_there(clip: Path, tmp_path: Path, refused: Callable[..., str]):
    assert "is not there" in refused(clip, f"--target-images={tmp_path / 'absent'}")
    assert "holds no image" in refused(clip, f"--target-images={tmp_path}")


def test_a_revision_that_is_left_out(clip: Path, refused: Callable[..., str]):
    assert "names no revision behind the @" in refused("openai/clip-vit-base-patch32@")
