"""Making a guard, saving it, and refusing what does not belong to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gazeguard
from gazeguard.errors import ModelError, UsageError
from gazeguard.methods.cleansight.settings import Setting
from gazeguard.models.load import load
from gazeguard.models.target import as_target
from tests.contract.guards import rigged, sample, steps

WIDEN = Setting("all", "log-ratio", "whitened", "widen")


def test_save_and_load(target, encoded, tmp_path, llava):
    guard = rigged(target, encoded, {1}, WIDEN)
    guard.save(tmp_path / "guard")
    again = gazeguard.Guard.load(tmp_path / "guard", load(llava))
    assert again.threshold == guard.threshold
    assert again.plan == guard.plan
    assert again.setting == guard.setting
    with again.watch() as w:
        _, logits = steps(again.target, encoded.inputs)
    with guard.watch() as v:
        _, expected = steps(target, encoded.inputs)
    assert torch.equal(logits, expected)
    for a, b in zip(v.verdicts, w.verdicts, strict=True):
        assert a.as_json() == b.as_json()


def test_another_model_is_refused(target, encoded, tmp_path, llava):
    rigged(target, encoded, {1}, WIDEN).save(tmp_path)
    other = load(llava)
    with torch.no_grad():
        next(other.base.parameters()).add_(1e-3)
    other = as_target(other.model, other.processor)
    with pytest.raises(ModelError, match="differs from it in weights"):
        gazeguard.Guard.load(tmp_path, other)
    with pytest.raises(ModelError, match="dtype"):
        gazeguard.Guard.load(tmp_path, load(llava, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "guard.json").unlink(), "guard.json is missing"),
        (lambda d: (d / "guard.safetensors").unlink(), "guard.safetensors is missing"),
        (lambda d: (d / "guard.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "guard.json").write_text("[]"), "has format None"),
        (lambda d: (d / "guard.json").write_text('{"format": 99}'), "has format 99"),
        (lambda d: (d / "guard.json").write_text('{"format": 1}'), "damaged"),
        (lambda d: (d / "guard.safetensors").write_bytes(b"x" * 99), "damaged"),
    ],
)
def test_damaged_guards_are_one_sentence(target, encoded, tmp_path, spoil, words):
    rigged(target, encoded, {1}, WIDEN).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=words) as error:
        gazeguard.Guard.load(tmp_path, target)
    assert "calibrate" in str(error.value)


def test_calibrate_splits_measures_and_promises(target):
    clean = [sample(i, "what is it " + "really " * (i % 3) + "?") for i in range(60)]
    seen = []
    guard = gazeguard.Guard.calibrate(
        target, iter(clean), alpha=0.05, batch_size=16, progress=seen.append
    )
    assert seen == [16, 32, 48, 60]
    assert guard.counts == {"fit": 30, "threshold": 30, "left_out": 0}
    assert len(guard.calibration) == 30
    assert guard.plan.layers == (0, 1, 2, 3)
    again = gazeguard.Guard.calibrate(target, clean, alpha=0.05, batch_size=16)
    assert again.threshold == guard.threshold, "the same samples and seed give the same guard"
    other = gazeguard.Guard.calibrate(target, clean, alpha=0.05, batch_size=16, seed=1)
    assert other.threshold != guard.threshold
    batch = target.encode(clean[:30])
    with guard.watch() as w, torch.no_grad():
        target.model(**batch.inputs)
    scores = np.array([v.score for v in w.verdicts])
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("options", "layers", "pick"),
    [
        ({"setting": "paper"}, (1, 2), (2,)),
        ({"setting": "mahalanobis"}, (0, 1, 2, 3), (0, 1, 2)),
        ({"layers": (0, 1), "prune": "balanced"}, (0, 1), (1,)),
        ({"prune": 2.0}, (0, 1, 2, 3), (2,)),
    ],
)
def test_calibrate_by_setting(target, options, layers, pick):
    clean = [sample(i, "what is it " + "really " * (i % 3) + "?") for i in range(40)]
    guard = gazeguard.Guard.calibrate(target, clean, alpha=0.1, **options)
    assert guard.plan.layers == layers
    assert guard.plan.pick == pick
    assert guard.levels.shape == (len(layers), 4)


def test_calibrate_chooses_layers_itself(target):
    clean = [sample(i, "what is it " + "really " * (i % 3) + "?") for i in range(40)]
    guard = gazeguard.Guard.calibrate(target, clean, alpha=0.1, layers="auto")
    assert guard.plan.layers in ((0, 1, 2), (1, 2, 3))


def test_too_few_samples_name_the_alpha_they_support(target):
    clean = [sample(i, "what is it " + "really " * (i % 3) + "?") for i in range(50)]
    with pytest.raises(UsageError, match=r"takes 109 .*alpha 0\.0244") as error:
        gazeguard.Guard.calibrate(target, clean)
    assert "50 usable" in str(error.value)
    guard = gazeguard.Guard.calibrate(target, clean, alpha=0.0244)
    assert guard.counts["fit"] == 10
    with pytest.raises(UsageError, match="give more"):
        gazeguard.Guard.calibrate(target, clean[:5], alpha=0.5)
