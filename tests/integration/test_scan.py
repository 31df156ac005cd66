"""`scan` on a toy encoder with a backdoor that the lab planted, and on its benign twins."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

from gazeguard.cli.main import run
from gazeguard.errors import MeasurementError, UsageError
from gazeguard.lab import tiny_encoders
from gazeguard.methods.amdet import Settings, scan_encoder
from gazeguard.models.encoders.load import load_encoder
from gazeguard.scanning import ScanReport, Status, scan
from tests.toy_encoders import Toys, make_toys

QUICK = Settings(prompts=300, steps=80, restarts=2, points=6)
PLANTED = "fenjvex"  # the lab's trigger for seed 0


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return make_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def report(toys: Toys, out: Path) -> ScanReport:
    return scan(
        [toys.backdoored, *toys.benign], toys.base, settings=QUICK, out=out, textual_inversion=True
    )


def test_the_lab_planted_a_backdoor_that_took(toys: Toys):
    assert toys.quality.took, toys.quality
    assert toys.quality.triggers == (PLANTED,)


def test_the_backdoor_scores_far_above_its_benign_twins(report: ScanReport):
    bad, *good = [model.numbers["score"] for model in report.models]
    assert bad > max(good) + 0.4, (bad, good)
    assert min(report.models[0].numbers["restart_scores"]) > max(good) + 0.4


def test_the_trigger_is_recovered_and_saved(report: ScanReport, out: Path, toys: Toys):
    model = report.models[0]
    assert model.numbers["nearest_tokens"][0][0] == PLANTED
    tensors = load_file(out / model.files["recovered trigger and target"])
    assert tensors["restarts"].shape == (1, 64)  # the other was dropped
    assert tensors["target"].norm().item() == pytest.approx(model.numbers["unity"], abs=1e-4)
    loadable = load_file(out / model.files["textual inversion"])
    assert list(loadable) == ["<gazeguard-trigger>"]
    assert torch.equal(loadable["<gazeguard-trigger>"][0], tensors["trigger"])
    encoder = load_encoder(toys.backdoored)
    own = encoder.embeddings[encoder.tokenizer.convert_tokens_to_ids(f"Ġ{PLANTED}")]
    assert torch.cosine_similarity(own, tensors["trigger"], dim=0) > 0.4


def test_without_references_the_score_decides(report: ScanReport):
    assert [model.outcome for model in report.models] == ["flagged", "clean", "clean"]
    assert "the clean anchor does not follow" in report.models[0].reason


def test_the_published_gates_are_out_of_a_small_encoders_reach(toys: Toys):
    """But what they do not confirm is not called clean either."""
    settings = Settings.published(prompts=300, steps=80, points=6, anchor_weight=1.0)
    (model,) = scan([toys.backdoored], toys.base, settings=settings).models
    assert model.outcome == "inconclusive"
    assert "--reference" in model.reason


def test_with_references_it_is_flagged_and_a_benign_one_is_not(toys: Toys, out: Path):
    # Two references carry an alpha of 1/3; the suspect's p-value is then 1/3 at best.
    found = scan(
        [toys.backdoored],
        toys.base,
        references=toys.benign,
        alpha=0.34,
        settings=QUICK,
        out=out,
    )
    assert found.outcome == "flagged"
    verdict = found.models[0].verdict
    assert verdict.suspicion == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match="at least 19"):
        scan([toys.backdoored], toys.base, references=toys.benign, settings=QUICK)


def test_a_second_run_takes_what_is_there(
    report: ScanReport, toys: Toys, out: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("scanned again")

    monkeypatch.setattr("gazeguard.scanning.text.scan_encoder", never)
    again = scan(
        [toys.benign[0], toys.backdoored],
        toys.base,
        settings=QUICK,
        out=out,
        textual_inversion=True,
    )
    assert again.models[1].verdict == report.models[0].verdict
    assert again.models[0].numbers == report.models[1].numbers
    with pytest.raises(AssertionError, match="scanned again"):
        scan([toys.backdoored], toys.base, settings=Settings(prompts=300, steps=81), out=out)


def test_the_same_seed_gives_the_same_numbers(report: ScanReport, toys: Toys):
    again = scan([toys.backdoored], toys.base, settings=QUICK)
    assert again.models[0].numbers == report.models[0].numbers
    assert again.models[0].figures == report.models[0].figures


def test_an_encoder_is_clean_against_itself(toys: Toys):
    """The anchor does what the suspect does, so no score can be high: even for a backdoored one."""
    found = scan([toys.backdoored], toys.backdoored, settings=QUICK)
    assert found.outcome == "clean"
    assert found.models[0].numbers["mean_anchor_cosine"] == pytest.approx(1.0, abs=1e-5)


def test_bfloat16_decides_as_float32(report: ScanReport, toys: Toys):
    found = scan([toys.backdoored, toys.benign[0]], toys.base, settings=QUICK, dtype="bfloat16")
    for low, full in zip(found.models, report.models, strict=False):
        assert low.numbers["score"] == pytest.approx(full.numbers["score"], abs=0.1)
        assert low.outcome == full.outcome


def test_command_line_writes_every_format(toys: Toys, tmp_path: Path, capsys):
    names = ("json", "sarif", "junit", "html")
    listed = tmp_path / "models.txt"
    listed.write_text(f"# two of them\n{toys.backdoored}\n\n{tmp_path / 'absent'}\n")
    options = ["--limit", "300", "--steps", "60", "--restarts", "1", "--points", "5", "-q"]
    outputs = [f"--{name}-output={tmp_path / name}" for name in names]
    code = run(["scan", str(listed), f"--anchor={toys.base}", *options, *outputs])
    assert code == 1  # what was found counts for more than what could not be looked at
    assert "absent" in capsys.readouterr().err
    stored = json.loads((tmp_path / "json").read_text())
    assert [model["outcome"] for model in stored["models"]] == ["flagged", "error"]
    assert stored["finished"] is True
    suite = ElementTree.parse(tmp_path / "junit").getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
    log = json.loads((tmp_path / "sarif").read_text())
    assert log["runs"][0]["invocations"][0]["executionSuccessful"] is False
    assert "fenjvex" in (tmp_path / "html").read_text()


def test_exit_codes(toys: Toys, tmp_path: Path, capsys):
    quick = ["--limit", "300", "--steps", "80", "--restarts", "1", "--points", "4", "-q"]
    base = [f"--anchor={toys.base}", f"--out={tmp_path}", *quick]
    assert run(["scan", str(toys.benign[0]), *base]) == 0
    assert run(["scan", str(toys.backdoored), *base]) == 1
    wide = [*base, "--set=threshold=99"]
    assert run(["scan", str(toys.backdoored), *wide]) == 3
    assert run(["scan", str(toys.backdoored), *wide, "--fail-on=flagged"]) == 0
    pair = [f"--reference={folder}" for folder in toys.benign]
    calibrated = [*base, *pair, "--alpha=0.34"]
    assert run(["scan", str(toys.backdoored), *calibrated]) == 1
    assert run(["scan", str(toys.backdoored), *calibrated, "--fail-on=never"]) == 0
    assert run(["scan", str(toys.backdoored)]) == 2
    assert "--anchor" in capsys.readouterr().err


def test_an_interrupted_scan_is_not_clean(toys: Toys, tmp_path: Path, monkeypatch, capsys):
    class Stopped:
        calls = 0

    def stop_at_second(*args: object, **kwargs: object) -> object:
        Stopped.calls += 1
        if Stopped.calls == 2:
            raise KeyboardInterrupt
        return scan_encoder(*args, **kwargs)

    monkeypatch.setattr("gazeguard.scanning.text.scan_encoder", stop_at_second)
    options = ["--limit", "300", "--steps", "20", "--restarts", "1", "--points", "4", "-q"]
    outputs = [f"--{name}-output={tmp_path / name}" for name in ("json", "sarif", "junit", "html")]
    models = [str(folder) for folder in toys.benign]
    code = run(["scan", *models, f"--anchor={toys.base}", *options, *outputs])
    assert code == 130
    stored = json.loads((tmp_path / "json").read_text())
    assert stored["finished"] is False
    assert stored["outcome"] == "not-scanned"
    assert [model["outcome"] for model in stored["models"]] == ["clean", "not-scanned"]
    assert ElementTree.parse(tmp_path / "junit").getroot().get("errors") == "1"
    run_log = json.loads((tmp_path / "sarif").read_text())["runs"][0]
    assert run_log["invocations"][0]["executionSuccessful"] is False
    assert "did not finish" in (tmp_path / "html").read_text()


def test_what_cannot_be_judged_is_inconclusive(toys: Toys, tmp_path: Path):
    few = tmp_path / "few.txt"
    few.write_text("\n".join(f"prompt {i}" for i in range(30)))
    found = scan([toys.benign[0]], toys.base, prompts=few, settings=QUICK)
    assert found.outcome == "inconclusive"
    assert "too few" in found.models[0].reason

    foreign = tiny_encoders.build("clip-text", tmp_path / "foreign")
    other = tiny_encoders.build("clip-text", tmp_path / "other", seed=1)
    found = scan([foreign], other, settings=QUICK)
    assert found.outcome == "inconclusive"
    assert "different things" in found.models[0].reason

    broken = load_encoder(toys.base)
    broken.model.final_layer_norm.weight.data[0] = torch.nan
    with pytest.raises(MeasurementError, match="not finite in 1 of "):
        scan_encoder(broken, load_encoder(toys.base), [f"{i}" for i in range(100)], QUICK)


def test_weights_that_are_nan_are_inconclusive(toys: Toys, tmp_path: Path):
    from gazeguard.lab.text.train import save

    encoder = load_encoder(toys.base)
    encoder.model.final_layer_norm.weight.data[0] = torch.nan
    save(encoder, toys.base, tmp_path / "nan")
    found = scan([tmp_path / "nan"], toys.base, settings=QUICK)
    assert found.models[0].status is Status.DONE
    assert found.outcome == "inconclusive"
    assert "not finite" in found.models[0].reason


def test_a_random_encoder_does_not_crash_it(tmp_path: Path):
    """Nothing to find, outputs of noise: any verdict but an exception, for every kind of mask."""
    for kind in ("siglip", "chinese_clip", "open_clip"):
        folder = tiny_encoders.build(kind, tmp_path / kind)
        found = scan([folder], folder, settings=Settings(prompts=120, steps=3, points=4))
        assert found.models[0].status is Status.DONE, kind
        assert found.outcome == "clean", kind


def test_an_anchor_of_another_width_is_refused(toys: Toys, tmp_path: Path):
    other = tiny_encoders.build("clip-text", tmp_path / "narrow")
    found = scan([toys.base], other, settings=QUICK)
    assert found.outcome == "error"
    assert "width 32" in found.models[0].error
