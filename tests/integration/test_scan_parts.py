"""What of a model was not scanned is listed, and then it is not clean: encoders and files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from gazeguard.cli.main import run
from gazeguard.lab import tiny_encoders
from gazeguard.methods.amdet import Settings
from gazeguard.report.scan import render_html
from gazeguard.scanning import ScanReport, scan
from gazeguard.scanning.options import VisionOptions
from tests.integration.conftest import MakeData
from tests.integration.test_scan_vision import adapter

QUICK = Settings(prompts=120, steps=2, points=3, restarts=1)
WEIGHTS = "model.safetensors"


def second_encoder(pipeline: Path, seed: int = 0) -> Path:
    """Give a pipeline the second encoder of an SDXL."""
    made = tiny_encoders.build("clip-projected", pipeline / "text_encoder_2", seed=seed)
    (pipeline / "tokenizer_2").mkdir()
    for file in made.glob("tokenizer*"):
        file.rename(pipeline / "tokenizer_2" / file.name)
    index = json.loads((pipeline / "model_index.json").read_text())
    index |= {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "image_encoder": [None, None],
    }
    (pipeline / "model_index.json").write_text(json.dumps(index))
    return pipeline


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean pipeline; read only."""
    pipeline = tiny_encoders.build("diffusers", tmp_path_factory.mktemp("models") / "sdxl")
    return second_encoder(pipeline)


@pytest.fixture
def suspect(sdxl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdxl, tmp_path / "suspect"))


def judged(report: ScanReport) -> dict[str, str]:
    return {model.model.rpartition("/")[2]: model.outcome for model in report.models}


def test_every_encoder_is_a_scan_of_its_own(sdxl: Path, suspect: Path):
    found = scan([suspect, suspect / "text_encoder"], sdxl, settings=QUICK)
    assert [model.model for model in found.models] == [
        f"{suspect}/text_encoder",
        f"{suspect}/text_encoder_2",
    ]
    assert judged(found) == {"text_encoder": "clean", "text_encoder_2": "clean"}
    assert found.models[1].numbers["encoder"]["width"] == 32
    assert found.provenance["anchor"]["model"] == f"{sdxl}/text_encoder"
    assert found.provenance["text_encoder_2"]["anchor"]["model"] == f"{sdxl}/text_encoder_2"


def test_nan_in_the_second_encoder(sdxl: Path, suspect: Path):
    file = suspect / "text_encoder_2" / WEIGHTS
    tensors = {name: value * torch.nan for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    found = scan(suspect, sdxl, settings=QUICK)
    assert judged(found) == {"text_encoder": "clean", "text_encoder_2": "inconclusive"}
    assert "not finite" in found.models[1].reason
    assert found.outcome == "inconclusive"
    # Also one that a comparison with an anchor without a projection leaves out.
    tensors = load_file(sdxl / "text_encoder_2" / WEIGHTS)
    tensors["text_projection.weight"] *= torch.nan
    save_file(tensors, file, {"format": "pt"})
    found = scan(f"{suspect}/text_encoder_2", sdxl / "text_encoder", settings=QUICK)
    assert "not finite" in found.models[0].reason


def test_an_anchor_alone_is_that_of_the_first_encoder(sdxl: Path, suspect: Path, capsys):
    options = [f"--anchor={sdxl / 'text_encoder'}", "--limit=120", "--steps=2", "--points=3"]
    assert run(["scan", str(suspect), *options]) == 3
    said = capsys.readouterr().out
    assert "1 undecided, 1 no sign of a backdoor" in said
    assert "give as --anchor the pipeline that it was made from" in said
    # But it can be scanned with an anchor of its own.
    found = scan(suspect / "text_encoder_2", sdxl / "text_encoder_2", settings=QUICK)
    assert found.outcome == "clean"


def test_encoders_of_other_kinds_are_listed(sdxl: Path, suspect: Path, tmp_path: Path):
    for place, kind in (("text_encoder_3", "t5"), ("image_encoder", "clip_vision_model")):
        (suspect / place).mkdir()
        (suspect / place / "config.json").write_text(json.dumps({"model_type": kind}))
    shutil.rmtree(suspect / "text_encoder_2")
    index = json.loads((suspect / "model_index.json").read_text())
    index |= {"text_encoder_3": ["transformers", "T5EncoderModel"]}
    (suspect / "model_index.json").write_text(json.dumps(index))
    found = scan(suspect, sdxl, settings=QUICK)
    assert judged(found) == {
        "image_encoder": "inconclusive",
        "text_encoder": "clean",
        "text_encoder_2": "error",
        "text_encoder_3": "inconclusive",
    }
    t5 = found.models[-1]
    assert "text_encoder_3 is a 't5' model, and only encoders of CLIP" in t5.reason
    assert [part.part for part in t5.not_scanned] == ["text_encoder_3"]
    assert "only text encoders are scanned" in found.models[0].reason


def test_references_are_those_of_the_same_encoder(sdxl: Path, suspect: Path, tmp_path: Path):
    known = [shutil.copytree(sdxl, tmp_path / f"known-{i}") for i in range(2)]
    found = scan(suspect, sdxl, references=known, alpha=0.34, settings=QUICK)
    assert [len(found.provenance["references"])] == [2]
    assert found.provenance["text_encoder_2"]["references"] == [
        f"{folder}/text_encoder_2" for folder in known
    ]


def test_a_variant_alone_is_scanned(sdxl: Path, suspect: Path):
    folder = suspect / "text_encoder"
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")
    assert scan(suspect, sdxl, settings=QUICK).outcome == "clean"


def test_a_variant_of_other_weights_in_every_report(sdxl: Path, suspect: Path, tmp_path: Path):
    folder = suspect / "text_encoder"
    tensors = {k: (v * 2).half() for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / "model.fp16.safetensors", {"format": "pt"})
    (suspect / "v1-5.ckpt").write_bytes(b"")
    names = ("json", "sarif", "junit", "html")
    outputs = [f"--{name}-output={tmp_path / name}" for name in names]
    quick = ["--limit=120", "--steps=2", "--points=3", "-q"]
    anchor = f"--anchor={sdxl / 'text_encoder'}"
    for _ in range(2):  # also from the results of an earlier run
        kept = [f"--out={tmp_path / 'out'}", anchor]
        assert run(["scan", str(folder), *kept, *quick, *outputs]) == 3
    stored = json.loads((tmp_path / "json").read_text())
    (model,) = stored["models"]
    assert model["outcome"] == "inconclusive"
    assert model["reason"].startswith("What was scanned shows no sign of a backdoor, but not all")
    assert [part["part"] for part in model["not_scanned"]] == [
        "model.fp16.safetensors",
        "../v1-5.ckpt",
    ]
    schema = Path(tiny_encoders.__file__).parents[1] / "report/schema/scan-report-1.json"
    jsonschema.Draft202012Validator(json.loads(schema.read_text())).validate(stored)
    log = json.loads((tmp_path / "sarif").read_text())
    official = (Path(__file__).parents[1] / "data" / "sarif-2.1.0.json").read_text()
    jsonschema.Draft4Validator(json.loads(official)).validate(log)
    assert log["runs"][0]["results"][0]["kind"] == "review"
    notes = log["runs"][0]["invocations"][0]["toolExecutionNotifications"]
    assert any("Not scanned: model.fp16.safetensors" in n["message"]["text"] for n in notes)
    (case,) = ElementTree.parse(tmp_path / "junit").getroot().iter("testcase")
    assert "Not scanned: ../v1-5.ckpt" in case.find("error").text
    page = (tmp_path / "html").read_text()
    assert "Not scanned" in page
    assert "model.fp16.safetensors" in page


def test_a_flagged_model_stays_flagged_and_tells(sdxl: Path, tmp_path: Path):
    from gazeguard.models.unread import Unread
    from gazeguard.types import Outcome
    from tests.unit.scan_fixture import scanned

    part = (Unread("pytorch_model.bin", "pickled"),)
    bad = scanned("bad", Outcome.FLAGGED, 1.0).without(part)
    assert bad.outcome == "flagged"
    assert bad.not_scanned == part
    good = scanned("good", Outcome.CLEAN, 0.1)
    assert good.without(()) == good
    assert good.without(part * 5).reason.count("pytorch_model.bin") == 3
    assert "pytorch_model.bin" in render_html(ScanReport((bad,), True, {}))
    with pytest.raises(ValueError, match="not clean"):
        type(good)("x", good.status, verdict=good.verdict, not_scanned=part)


def test_adapters_and_whole_models(llava: Path, make_data: MakeData, tmp_path: Path):
    """LLaVA's trainables, a merged model beside an adapter, pickled weights beside others."""
    data = make_data(10)
    known = [llava, *(adapter(llava, tmp_path / f"benign-{i}", i) for i in range(4))]
    asked = {"references": known, "alpha": 0.2, "vision": VisionOptions(samples=data)}
    plain = adapter(llava, tmp_path / "plain", 7)
    left = adapter(llava, tmp_path / "left", 7)
    (left / "non_lora_trainables.bin").write_bytes(b"")
    shutil.copy(llava / WEIGHTS, left)
    base = Path(shutil.copytree(llava, tmp_path / "base"))
    (base / "pytorch_model.bin").write_bytes(b"")
    found = scan([plain, left, base], **asked)
    assert [model.outcome for model in found.models] == ["clean", "inconclusive", "inconclusive"]
    parts = [[part.part for part in model.not_scanned] for model in found.models]
    assert parts == [[], [WEIGHTS, "non_lora_trainables.bin"], ["pytorch_model.bin"]]
    assert found.models[0].numbers == found.models[1].numbers


def test_an_adapter_that_changes_nothing(llava: Path, make_data: MakeData, tmp_path: Path, capsys):
    idle = adapter(llava, tmp_path / "idle", 0)
    file = idle / "adapter_model.safetensors"
    tensors = {k: v * ("lora_A" in k) for k, v in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    data = make_data(10)
    for more in ([], ["--make-references=2", "--reference-steps=1"]):
        options = [f"--reference={llava}", f"--samples={data}", "-q", *more]
        out = tmp_path / f"out{len(more)}"
        assert run(["scan", str(idle), *options, f"--out={out}", "--format=json"]) == 3
        (model,) = json.loads(capsys.readouterr().out)["models"]
        assert model["outcome"] == "inconclusive"
        assert "changes nothing" in model["reason"]
    asked = [str(llava), str(data), f"--adapter={idle}", f"--out={tmp_path / 'clean'}", "-q"]
    assert run(["clean", *asked]) == 3
    assert "changes nothing" in capsys.readouterr().err
    asked = [str(llava), str(data), f"--adapter={idle}", f"--out={tmp_path / 'guard'}", "-q"]
    assert run(["calibrate", *asked]) == 3
    assert "changes nothing" in capsys.readouterr().err


def test_the_base_that_an_adapter_names_is_told(llava: Path, make_data: MakeData, tmp_path: Path):
    other = adapter(llava, tmp_path / "other", 0)
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "llava-hf/llava-1.5-7b-hf"
    (other / "adapter_config.json").write_text(json.dumps(config))
    vision = VisionOptions(samples=make_data(10))
    found = scan(other, references=[llava], vision=vision)
    said = [finding.message for finding in found.models[0].verdict.evidence]
    assert any("names llava-hf/llava-1.5-7b-hf as its base" in message for message in said)
