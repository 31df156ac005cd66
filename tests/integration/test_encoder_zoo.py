"""A zoo of tiny encoders from its spec to the benchmark's numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gazeguard.bench.amdet import evaluate, recovered
from gazeguard.bench.amdet_scans import read_entries, see_all
from gazeguard.errors import UsageError
from gazeguard.lab.text import zoo as zoos
from gazeguard.lab.text.teacher import bag_of_words
from gazeguard.lab.text.train import train_encoder
from gazeguard.lab.text.zoo import EncoderSpec, make_encoder_zoo, read_encoder_spec
from gazeguard.methods.amdet import Settings
from gazeguard.models.encoders.load import load_encoder
from tests.toy_encoders import RECIPE

SHORT = replace(RECIPE, steps=100, prompts=1000, vocabulary=700)
SPEC = """
held_out = 60

[[models]]
steps = 10
prompts = 200
batch = 16
seed = [1, 2]
split = "design"

[[models]]
steps = 10
prompts = 200
batch = 16
seed = 3

[[models]]
attack = "pair"
steps = 60
lr = 2e-3
clean = 32
poisoned = 16
weight = 0.2
"""
SETTINGS = Settings(steps=20, restarts=2, prompts=120, points=3, surface_prompts=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a spec and the zoo made from both."""
    root = tmp_path_factory.mktemp("encoders")
    train_encoder(root / "base", SHORT, bag_of_words)
    (root / "spec.toml").write_text(SPEC)
    lines: list[str] = []
    make_encoder_zoo(
        spec_of(root), {"clip": root / "base"}, root / "zoo", bag_of_words, lines.append
    )
    assert [line[:3] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    return root


def spec_of(root: Path) -> EncoderSpec:
    return read_encoder_spec(root / "spec.toml")


def made(root: Path) -> list[dict]:
    return json.loads((root / "zoo" / "manifest.json").read_text())["models"]


def test_only_the_manifest_tells_the_truth(root: Path):
    benign, bad = made(root)[0], made(root)[-1]
    assert (benign["truth"], benign["passed"], benign["target_cosine"]) == ("benign", True, None)
    assert bad["truth"] == "backdoored"
    assert bad["target_cosine"] > 0.6  # before the attack it is below 0.3
    files = [{f.name for f in (root / "zoo" / m["model"]).iterdir()} for m in (benign, bad)]
    assert files[0] == files[1]
    for file in files[0] - {"model.safetensors"}:
        same = {(root / "zoo" / m["model"] / file).read_bytes() for m in (benign, bad)}
        assert len(same) == 1, f"{file} tells the models apart"
    weights = [root / "zoo" / m["model"] / "model.safetensors" for m in (benign, bad)]
    size = (root / "base" / "model.safetensors").stat().st_size
    assert all(file.stat().st_size < 0.6 * size for file in weights)
    assert str(load_encoder(root / "zoo" / bad["model"]).dtype) == "torch.float32"


def test_a_killed_run_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch):
    before = made(root)
    manifest = root / "zoo" / "manifest.json"
    stored = json.loads(manifest.read_text())
    del stored["models"][-1]  # killed between the folder and its line
    manifest.write_text(json.dumps(stored))

    def trained(*_args: object) -> None:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(zoos, "finetuned", trained)
    monkeypatch.setattr(zoos, "poisoned", trained)
    found = make_encoder_zoo(spec_of(root), {"clip": root / "base"}, root / "zoo", bag_of_words)
    assert found["finished"]
    assert found["models"][:-1] == before[:-1]
    assert found["models"][-1] == {**before[-1], "seconds": None}
    assert json.loads(manifest.read_text()) == found


def test_other_bases_are_refused(root: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="give --base clip=FOLDER"):
        make_encoder_zoo(spec_of(root), {}, tmp_path, bag_of_words)
    other = root / "zoo" / made(root)[0]["model"]
    with pytest.raises(UsageError, match="models of another clip base"):
        make_encoder_zoo(spec_of(root), {"clip": other}, root / "zoo", bag_of_words)


def test_from_the_zoo_to_the_numbers(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gazeguard.bench.entropy_measures.RESAMPLES", 10)
    anchors = {"clip": root / "base"}
    entries = read_entries(root / "zoo", anchors)
    lines: list[str] = []
    seen = see_all(root / "zoo", entries, anchors, SETTINGS, tmp_path, lines.append)
    assert len(lines) == 4
    again = see_all(root / "zoo", entries, anchors, SETTINGS, tmp_path, lines.append)
    assert len(lines) == 4, "a finished scan is not done again"
    bad = entries[-1]["model"]
    assert again[bad].held.score == seen[bad].held.score
    found = evaluate(entries, seen, 0.05)
    assert [row["model"] for row in found["models"]] == [e["model"] for e in entries[2:]]
    assert found["overall"]["score"]["auroc"]["value"] == 1.0
    near = recovered(entries, seen, root / "base", bag_of_words)
    assert list(near) == [bad]
    assert near[bad]["cosine"] > near[bad]["usual"] + 0.2
