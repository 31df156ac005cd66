"""The adaptive attacker reads what a scan reads, and can learn from it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from gazeguard.cleaning.measure import SIGNALS
from gazeguard.errors import UsageError
from gazeguard.lab.architectures import ARCHITECTURES, architecture_of
from gazeguard.lab.base_recipe import BaseRecipe
from gazeguard.lab.disguise import DISGUISES, Disguise
from gazeguard.lab.finetune import Student, TuneRecipe
from gazeguard.lab.objectives import Answers, Course
from gazeguard.lab.poison import TARGET, make_set, samples
from gazeguard.lab.tower import normalise
from gazeguard.lab.vocabulary import make_tokenizer
from gazeguard.methods.bye.conditioning import _features
from gazeguard.methods.entropyscan.settings import PROBED_Q
from gazeguard.models.target import as_target
from gazeguard.probe.attention import attend
from gazeguard.scanning.look import look
from gazeguard.types import KeyKind

# Questions of different lengths; a quarter of the rows is poisoned.
ROWS = make_set("mixed", 12, "badnet-center", 0.25, seed=3)
CLEAN = np.array([not row.is_poison for row in ROWS])
EVERY = np.arange(len(ROWS))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def student(request):
    """A random model of each architecture; only ever copied."""
    kind = architecture_of(request.param)
    tokenizer = make_tokenizer(kind)
    torch.manual_seed(0)
    recipe = BaseRecipe(hidden=32, tower_layers=1, language_layers=3, heads=2)
    made = kind.make_model(recipe, tokenizer).eval()
    made.set_attn_implementation("eager")
    # Random weights hardly attend: sharper queries make numbers that differ.
    for name, weight in made.named_parameters():
        if "language_model" in name and "q_proj" in name:
            weight.data *= 20
    return Student(made, kind.make_processor(tokenizer))


def disguise(student, name, rows=ROWS, weight=1.0):
    with torch.inference_mode():
        pixels = normalise(np.stack([row.pixels for row in rows]))
        features = student.architecture.look(student.core, pixels).clone()
    lessons = student.encode(rows, features.shape[1])
    course = Course(student.core, student.processor, rows, lessons, features, TARGET)
    return Disguise(name, course, Answers(course), weight)


def moved(hidden, model, pick):
    return hidden.loss(model, pick).parts["attention moved"]


def with_lora(student):
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|k|v|o)_proj")
    return get_peft_model(student.model, config)


@pytest.fixture
def own(student):
    return Student(copy.deepcopy(student.model), student.processor)


@pytest.mark.parametrize("name", ["entropy", "profile", "ratio"])
def test_the_attacker_reads_the_numbers_of_a_scan(student, name):
    found = disguise(student, name).wanted
    sight = look(as_target(student.model, student.processor), samples(ROWS), PROBED_Q)
    half = [0, 1]  # of three layers, rounded up
    seen = {
        "entropy": [sight.entropy[:, half]],
        "profile": [sight.head_entropy, sight.mass, sight.ratio],
        "ratio": [sight.ratio],
    }[name]
    theirs = np.concatenate([part.reshape(len(ROWS), -1) for part in seen], 1)
    np.testing.assert_allclose(found.numpy(), theirs, rtol=1e-3, atol=1e-4)
    assert found.std(0).min() > 1e-3, "numbers that never differ would agree by themselves"


def test_the_attacker_reads_the_numbers_of_byes_robust_rule(student):
    found = disguise(student, "bye").wanted.numpy()
    target = as_target(student.model, student.processor)
    rows = attend(target, target.encode(samples(ROWS)), reduce_heads=False)
    signals = {
        name: signal(rows.weights, rows.key_kind).numpy() for name, signal in SIGNALS.items()
    }
    tokens = (rows.key_kind == KeyKind.IMAGE).sum(1).numpy()
    theirs = _features(signals, tokens)
    assert found.shape == theirs.shape
    # Theirs are relative to the even look, the same for every row.
    gaps = (found - theirs) - (found - theirs)[0]
    np.testing.assert_allclose(gaps, np.zeros_like(gaps), atol=2e-3)


@pytest.mark.parametrize("name", DISGUISES)
def test_an_untouched_adapter_pays_nothing(own, name):
    hidden = disguise(own, name)
    assert moved(hidden, with_lora(own), EVERY).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", DISGUISES)
def test_the_penalty_teaches_the_adapter_the_way_back(own, name):
    hidden = disguise(own, name)
    model = with_lora(own)
    pulled = {n: p for n, p in model.named_parameters() if "lora" in n and "q_proj" in n}
    with torch.no_grad():
        for weight in pulled.values():
            weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    before = moved(hidden, model, EVERY)
    before.backward()
    assert before.item() > 0.01
    # A scan of the first half of the layers sees nothing of the last one.
    for at in range(2 if name == "entropy" else 3):
        grads = [p.grad for n, p in pulled.items() if f"layers.{at}." in n]
        assert grads
        assert all(g.isfinite().all() and g.any() for g in grads)
    with torch.no_grad():
        length = torch.cat([p.grad.flatten() for p in pulled.values() if p.grad is not None]).norm()
        for weight in pulled.values():
            if weight.grad is not None:
                weight -= 1e-3 * weight.grad / length
    assert moved(hidden, model, EVERY) < before


@pytest.mark.parametrize("name", DISGUISES)
def test_the_other_rows_are_free(own, name):
    hidden = disguise(own, name)
    held, free = np.flatnonzero(CLEAN), np.flatnonzero(~CLEAN)
    if name in ("bye", "ratio"):
        held, free = free, held
    model = with_lora(own)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight += 0.2
    assert moved(hidden, model, free) == 0
    together, alone = (moved(hidden, model, pick) for pick in (EVERY, held))
    assert together.item() == pytest.approx(alone.item(), rel=1e-3)
    assert alone > 0


def test_the_penalty_is_paid_by_its_weight(own):
    hidden = disguise(own, "bye", weight=3.0)
    model = with_lora(own)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight += 0.2
    total, parts = hidden.loss(model, EVERY)
    expected = parts["loss"] + 3.0 * parts["attention moved"]
    assert total.item() == pytest.approx(expected.item())
    assert parts["attention moved"] > 0


@pytest.mark.parametrize(("name", "kind"), [("bye", "poisoned"), ("profile", "clean")])
def test_nothing_to_hold_is_refused(student, name, kind):
    rows = [replace(row, is_poison=kind == "clean") for row in ROWS]
    with pytest.raises(UsageError, match=f"no row of the upload is {kind}"):
        disguise(student, name, rows)


def test_what_cannot_be_hidden_is_refused():
    with pytest.raises(UsageError, match="'trigger' cannot be hidden: .* profile, bye, ratio"):
        TuneRecipe(epochs=1, batch=16, lr=2e-3, hide="trigger")
