"""The encoder of the `issba` trigger: what ships does what its scores say, and can be remade."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gazeguard.assets import STEGO
from gazeguard.cli.lab import lab
from gazeguard.errors import ModelError
from gazeguard.lab.rows import make_rows
from gazeguard.lab.stego import BITS, StegoRecipe, _load, judge, residual, train_stego
from gazeguard.lab.triggers import Stego


def test_the_shipped_weights_score_as_they_say():
    said = json.loads((STEGO / "scores.json").read_text())
    recipe = StegoRecipe(**json.loads((STEGO / "recipe.json").read_text()))
    assert judge(STEGO, recipe.amplitude) == pytest.approx(said, abs=2e-3)
    assert said["bits"] > 0.99
    assert recipe == StegoRecipe(), "the recipe that ships is the one that the command uses"
    assert (STEGO / "model.safetensors").stat().st_size < 150_000


def test_the_message_is_read_from_triggered_pictures_and_not_from_clean_ones():
    rows = make_rows("captions", 40, 5, held_out=True)
    bits = np.random.default_rng(3).integers(0, 2, BITS).astype(bool)
    decoder = _load(STEGO)[1]

    def read(pictures):
        with torch.inference_mode():
            seen = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).double() / 255
            return ((decoder(seen) > 0).numpy() == bits).mean()

    rng = np.random.default_rng(0)
    assert read([Stego(secret=3)(row.pixels, rng) for row in rows]) > 0.99
    assert 0.2 < read([row.pixels for row in rows]) < 0.8


@pytest.mark.parametrize("side", [(64, 64), (1, 1), (7, 200), (336, 224)])
def test_a_residual_has_the_pictures_size_and_stays_in_range(side):
    pixels = np.random.default_rng(0).integers(0, 256, (*side, 3), dtype=np.uint8)
    found = residual(pixels, 0)
    assert found.shape == pixels.shape
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1
    assert (found == residual(pixels, 0)).all()


def test_training_is_repeatable_and_the_command_says_the_scores(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("gazeguard.lab.stego._HELD_OUT", 20)
    recipe = StegoRecipe(pictures=32, steps=3)
    scores = [train_stego(tmp_path / name, recipe, log=lambda line: None) for name in "ab"]
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other
    assert scores[0] == scores[1]
    done = CliRunner().invoke(lab, ["stego", "--out", str(tmp_path / "c"), "--steps", "1"])
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "c" / "scores.json").read_text())
    assert f"{said['bits']:.2%} of bits read right on 20 held-out pictures" in done.output
    assert json.loads((tmp_path / "c" / "recipe.json").read_text())["steps"] == 1
    assert CliRunner().invoke(lab, ["stego", "--out", "x", "--steps", "0"]).exit_code == 2


def test_a_folder_without_weights_is_one_sentence(tmp_path: Path):
    with pytest.raises(ModelError, match="make it with `gazeguard lab stego`"):
        judge(tmp_path, 16.0)
