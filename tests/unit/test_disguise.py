"""The adaptive attacker reads what a scan reads, and can learn from it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from gazeguard.errors import UsageError
from gazeguard.lab.architectures import ARCHITECTURES, architecture_of
from gazeguard.lab.base_recipe import BaseRecipe
from gazeguard.lab.disguise import DISGUISES, Disguise
from gazeguard.lab.finetune import Student, TuneRecipe
from gazeguard.lab.poison import make_set, samples
from gazeguard.lab.tower import normalise
from gazeguard.lab.vocabulary import make_tokenizer
from gazeguard.methods.entropyscan.settings import PROBED_Q
from gazeguard.models.target import as_target
from gazeguard.scanning.look import look

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


def disguise(student, name):
    with torch.inference_mode():
        pixels = normalise(np.stack([row.pixels for row in ROWS]))
        features = student.architecture.look(student.core, pixels).clone()
    lessons = student.encode(ROWS, features.shape[1])
    return Disguise(name, student.core, student.processor, ROWS, lessons, features)


def with_lora(student):
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|k|v|o)_proj")
    return get_peft_model(student.model, config)


@pytest.fixture
def own(student):
    return Student(copy.deepcopy(student.model), student.processor)


@pytest.mark.parametrize("name", DISGUISES)
def test_the_attacker_reads_the_numbers_of_a_scan(student, name):
    found = disguise(student, name).wanted
    sight = look(as_target(student.model, student.processor), samples(ROWS), PROBED_Q)
    half = [0, 1]  # of three layers, rounded up
    seen = {
        "entropy": [sight.entropy[:, half]],
        "profile": [sight.head_entropy, sight.mass, sight.ratio],
    }[name]
    theirs = np.concatenate([part.reshape(len(ROWS), -1) for part in seen], 1)
    np.testing.assert_allclose(found.numpy(), theirs, rtol=1e-3, atol=1e-4)
    assert found.std(0).min() > 1e-3, "numbers that never differ would agree by themselves"


@pytest.mark.parametrize("name", DISGUISES)
def test_an_untouched_adapter_pays_nothing(own, name):
    hidden = disguise(own, name)
    assert hidden.loss(with_lora(own), EVERY)[1].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", DISGUISES)
def test_the_penalty_teaches_the_adapter_the_way_back(own, name):
    hidden = disguise(own, name)
    model = with_lora(own)
    pulled = {n: p for n, p in model.named_parameters() if "lora" in n and "q_proj" in n}
    with torch.no_grad():
        for weight in pulled.values():
            weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    _, before = hidden.loss(model, EVERY)
    before.backward()
    assert before.item() > 0.01
    # A scan of the first half of the layers sees nothing of the last one.
    for at in range(3 if name == "profile" else 2):
        grads = [p.grad for n, p in pulled.items() if f"layers.{at}." in n]
        assert grads
        assert all(g.isfinite().all() and g.any() for g in grads)
    with torch.no_grad():
        length = torch.cat([p.grad.flatten() for p in pulled.values() if p.grad is not None]).norm()
        for weight in pulled.values():
            if weight.grad is not None:
                weight -= 1e-3 * weight.grad / length
    assert hidden.loss(model, EVERY)[1] < before


def test_poisoned_rows_are_free(own):
    hidden = disguise(own, "profile")
    model = with_lora(own)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight += 0.2
    assert hidden.loss(model, np.flatnonzero(~CLEAN))[1] == 0
    together, alone = (hidden.loss(model, pick)[1] for pick in (EVERY, np.flatnonzero(CLEAN)))
    assert together.item() == pytest.approx(alone.item(), rel=1e-3)
    assert alone > 0


def test_what_cannot_be_hidden_is_refused():
    with pytest.raises(UsageError, match="'trigger' cannot be hidden: .* nothing, entropy, prof"):
        TuneRecipe(epochs=1, batch=16, lr=2e-3, hide="trigger")
