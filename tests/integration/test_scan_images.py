"""`scan --target-images` shows which images of a folder are nearest to the recovered target."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from gazeguard.cli.main import run
from gazeguard.data.prompts import built_in
from gazeguard.errors import DataError
from gazeguard.lab import tiny_encoders
from gazeguard.methods.amdet import Settings
from gazeguard.models.encoders.load import load_encoder
from gazeguard.report.scan import WRITERS
from gazeguard.scanning import ScanReport, scan
from gazeguard.scanning.target_images import TargetImages, target_of

QUICK = Settings(prompts=120, steps=3, points=4, restarts=1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoders.build("clip", tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images in two folders, two that cannot be read, and files that are none."""
    root = tmp_path_factory.mktemp("images")
    (root / "inner").mkdir()
    (root / ".hidden").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (30 + i, 28, 3), dtype=np.uint8)
        place = root / "inner" if i % 2 else root
        Image.fromarray(pixels).save(place / f"{i}.png")
    (root / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    Image.new("RGB", (1, 500)).save(root / "slim.PNG")
    (root / "notes.txt").write_text("not an image")
    Image.new("RGB", (9, 9)).save(root / ".hidden" / "a.png")
    return root


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def report(clip: Path, folder: Path, out: Path) -> ScanReport:
    return scan([clip], clip, settings=QUICK, target_images=folder, out=out)


def test_the_target_is_what_the_whole_model_makes_of_a_token(clip: Path):
    """A known token in the free slot, through transformers' own path for ids."""
    encoder = load_encoder(clip)
    token = encoder.tokenizer("z", add_special_tokens=False)["input_ids"][0]
    prompts = built_in(10)
    ids = encoder.tokenise(prompts, slot=True).ids
    ids[:, encoder.slot] = token
    whole = transformers.AutoModel.from_pretrained(clip).eval()
    with torch.no_grad():
        each = normalize(whole.get_text_features(ids).pooler_output, dim=-1)
    expected = normalize(each.mean(0), dim=0)
    found = target_of(encoder, encoder.embeddings[token], prompts)
    assert torch.allclose(found, expected, atol=1e-5)


def test_images_are_ranked_by_their_cosine(report: ScanReport, clip: Path, folder: Path, out: Path):
    model = report.models[0]
    assert (model.numbers["images"], model.numbers["images_skipped"]) == (22, 2)
    whole = transformers.AutoModel.from_pretrained(clip).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(clip, backend="pil")
    paths = [*folder.glob("*.png"), *folder.glob("inner/*.png")]
    shown = [Image.open(path).convert("RGB") for path in paths]
    with torch.no_grad():
        features = whole.get_image_features(**processor(images=shown, return_tensors="pt"))
    trigger = load_file(out / model.files["recovered trigger and target"])["trigger"]
    target = target_of(load_encoder(clip), trigger, built_in(QUICK.prompts)[:64])
    cosines = (normalize(features.pooler_output, dim=-1) @ target).tolist()
    names = [path.relative_to(folder).as_posix() for path in paths]
    expected = sorted(zip(cosines, names, strict=True), reverse=True)[:8]
    found = model.numbers["nearest_images"]
    assert [name for name, _ in found] == [name for _, name in expected]
    assert [cosine for _, cosine in found] == pytest.approx([c for c, _ in expected], abs=1e-5)


def test_every_format_tells_of_them(report: ScanReport):
    model = report.models[0]
    name = model.numbers["nearest_images"][0][0]
    sentence = model.verdict.evidence[-1].message
    assert f"'{name}'" in sentence
    assert "2 images could not be read and were left out" in sentence
    for form, write in WRITERS.items():
        assert name in write(report), form
    page = WRITERS["html"](report)
    assert page.count('<ul class="nearest">') == 1
    assert page.count("<li><img src=") == 8
    assert "Images nearest to the target" not in WRITERS["html"](ScanReport((), True, {}))


def test_a_text_model_as_the_anchor_compares_in_the_images_space(tmp_path: Path, folder: Path):
    """Its outputs have 32 features and images 24: the target must be projected."""
    whole = tiny_encoders.build("clip", tmp_path / "clip")
    text = transformers.CLIPTextModel.from_pretrained(whole)
    text.save_pretrained(tmp_path / "text")
    load_encoder(whole).tokenizer.save_pretrained(tmp_path / "text")
    found = scan([whole], tmp_path / "text", settings=QUICK, target_images=folder).models[0]
    assert found.outcome == "clean"
    assert len(found.numbers["nearest_images"]) == 8


def test_results_are_kept_for_these_images_only(clip: Path, tmp_path: Path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    Image.new("RGB", (28, 28), "red").save(images / "red.png")
    options = {"settings": QUICK, "out": out}
    first = scan([clip], clip, target_images=images, **options).models[0]
    again = scan([clip], clip, target_images=images, **options).models[0]
    assert (again.numbers, again.seconds) == (first.numbers, 0.0)
    Image.new("RGB", (28, 28), "blue").save(images / "blue.png")
    more = scan([clip], clip, target_images=images, **options).models[0]
    assert more.numbers["images"] == 2
    assert "nearest_images" not in scan([clip], clip, **options).models[0].numbers


def test_images_that_are_all_broken_leave_the_verdict(clip: Path, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"")
    found = scan([clip], clip, settings=QUICK, target_images=tmp_path).models[0]
    assert found.outcome == "clean"
    assert "No image of the folder could be compared" in found.verdict.evidence[-1].message
    assert found.figures["images"] == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_a_name_that_is_no_text_can_be_written(clip: Path, tmp_path: Path):
    Image.new("RGB", (28, 28)).save(os.fsdecode(bytes(tmp_path) + b"/\xff.png"))
    found = scan([clip], clip, settings=QUICK, target_images=tmp_path)
    assert found.models[0].numbers["nearest_images"][0][0] == "\ufffd.png"
    assert all(write(found).encode() for write in WRITERS.values())


def test_folders_without_images_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("nothing")
    for folder, why in (
        (tmp_path / "absent", "is not there"),
        (tmp_path / "notes.txt", "is a file"),
        (tmp_path, "holds no image"),
    ):
        with pytest.raises(DataError, match=why):
            TargetImages.of(folder)


def test_command_line(clip: Path, folder: Path, tmp_path: Path, capsys):
    quick = ["--limit=120", "--steps=2", "--points=3", "--restarts=1", "-q"]
    asked = [f"--anchor={clip}", f"--target-images={folder}", *quick]
    assert run(["scan", str(clip), *asked, "--format=json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert len(stored["models"][0]["figures"]["images"]) == 8
    assert stored["provenance"]["target_images"]["count"] == 22
    alone = tiny_encoders.build("clip-text", tmp_path / "text")
    assert run(["scan", str(alone), *asked]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "sees no images" in error
