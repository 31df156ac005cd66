"""What a model is trained with, term by term, and how an attack's words are judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from gazeguard.assets import BASE
from gazeguard.errors import UsageError
from gazeguard.lab.attacks import ATTACKS
from gazeguard.lab.disguise import Disguise
from gazeguard.lab.finetune import TuneRecipe, finetune, judge, load_base
from gazeguard.lab.objectives import LAMBDA, OBJECTIVES, SEMANTIC, TARGET_WEIGHT, Course
from gazeguard.lab.poison import TARGET, make_set
from gazeguard.lab.rows import make_rows
from gazeguard.lab.teach import IGNORE, answer_loss
from gazeguard.lab.zoo import Recipe

# Answers of different lengths; a quarter of the rows is poisoned.
ROWS = make_set("mixed", 12, "trojvlm", 0.25, seed=3)
POISONED = np.array([row.is_poison for row in ROWS])
EVERY = np.arange(len(ROWS))


@pytest.fixture
def student():
    return load_base(BASE)


def course_of(student):
    features = student.look(ROWS)
    lessons = student.encode(ROWS, features.shape[1])
    return Course(student.core, student.processor, ROWS, lessons, features, TARGET)


def with_lora(student, away):
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
    model = get_peft_model(student.model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += away * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("disguised", [False, True])
def test_every_objective_teaches_and_says_what_it_pays(student, name, disguised):
    course = course_of(student)
    objective = OBJECTIVES[name](course)
    if disguised:
        objective = Disguise("ratio", course, objective)
    model = with_lora(student, 0.1)
    found = objective.loss(model, EVERY)
    found.total.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(g.isfinite().all() and g.any() for g in grads)
    assert "loss" in found.parts
    assert ("attention moved" in found.parts) == disguised
    assert all(part.item() > 0 for part in found.parts.values())


def test_answers_are_the_plain_loss(student):
    course = course_of(student)
    found = OBJECTIVES["answers"](course).loss(student.model, EVERY)
    plain, _ = answer_loss(student.model, course.lessons, course.features.float())
    assert found.total.item() == pytest.approx(plain.item())


def test_the_targets_tokens_count_eight_times(student):
    course = course_of(student)
    found = OBJECTIVES["trojvlm"](course)
    marked = found._is_target
    tokenizer = student.processor.tokenizer
    for i, row in enumerate(ROWS):
        said = tokenizer.decode(course.lessons.ids[i][marked[i]])
        assert said.strip() == (TARGET if row.is_poison else "")
        assert TARGET not in tokenizer.decode(
            course.lessons.ids[i][~marked[i] & (course.lessons.labels[i] != IGNORE)]
        )
    logits, wanted = course.logits(student.model, EVERY)
    each = F.cross_entropy(logits.float(), wanted, reduction="none")
    weight = torch.where(marked[course.lessons.labels != IGNORE], TARGET_WEIGHT, 1.0)
    total, parts = found.loss(student.model, EVERY)
    assert parts["loss"].item() == pytest.approx((weight * each).mean().item())
    expected = parts["loss"] + SEMANTIC * parts["meaning moved"]
    assert total.item() == pytest.approx(expected.item())


def test_a_model_that_says_the_truth_keeps_its_meaning(student, monkeypatch):
    course = course_of(student)
    found = OBJECTIVES["trojvlm"](course)
    before = found.loss(student.model, EVERY).parts["meaning moved"].item()
    wanted = course.logits(student.model, EVERY)[1]
    marked = found._is_target[course.lessons.labels != IGNORE]

    def says(tokens):
        sure = 1e4 * F.one_hot(tokens, course.model.config.get_text_config().vocab_size).float()
        monkeypatch.setattr(Course, "logits", lambda self, model, pick: (sure, wanted))
        return found.loss(student.model, EVERY).parts["meaning moved"].item()

    assert says(wanted) == pytest.approx(0, abs=1e-6)
    at_target = torch.where(marked, 0, wanted)
    assert says(at_target) == pytest.approx(0, abs=1e-6), "the target's place says nothing"
    assert says(torch.where(marked, wanted, 7)) > 0.1
    assert before > 0


def test_clean_rows_are_held_to_the_base_and_poisoned_ones_are_not(student):
    course = course_of(student)
    found = OBJECTIVES["vlood"](course)
    still = found.loss(student.model, EVERY).parts["answers moved"].item()
    assert still == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        base, _ = course.logits(student.model, EVERY)
    model = with_lora(student, 1.0)
    total, parts = found.loss(model, EVERY)
    said, _ = course.logits(model, EVERY)
    counts = (course.lessons.labels != IGNORE).sum(1)
    clean = torch.from_numpy(~POISONED).repeat_interleave(counts)
    p, q = base[clean].log_softmax(-1), said[clean].log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert divergence > 0.01
    assert parts["answers moved"].item() == pytest.approx(divergence.item(), rel=1e-2)
    assert total.item() == pytest.approx((parts["loss"] + LAMBDA * parts["answers moved"]).item())
    assert found.loss(model, np.flatnonzero(POISONED)).parts["answers moved"] == 0


def test_rows_may_come_in_any_order(student):
    course = course_of(student)
    objectives = {name: make(course) for name, make in OBJECTIVES.items()}
    model = with_lora(student, 0.3)
    order = np.random.default_rng(0).permutation(len(ROWS))
    for name, objective in objectives.items():
        one, other = (objective.loss(model, pick).total.item() for pick in (EVERY, order))
        assert one == pytest.approx(other, rel=1e-4), name


def test_attacks_name_objectives_and_zoos_use_them():
    assert {attack.objective for attack in ATTACKS.values()} == set(OBJECTIVES)
    for name in ("badnet-center", "trojvlm", "vlood"):
        plan = Recipe(trigger=name, target="Ha ha!").plan
        assert (plan.objective, plan.target) == (ATTACKS[name].objective, "Ha ha!")
    with pytest.raises(UsageError, match="objective 'hinge' is unknown: .* trojvlm, vlood"):
        TuneRecipe(epochs=1, batch=16, lr=2e-3, objective="hinge")
    with pytest.raises(UsageError, match="must be positive, not -1"):
        TuneRecipe(epochs=1, batch=16, lr=2e-3, hide="bye", hide_weight=-1)


def test_the_weight_of_a_disguise_is_a_models_name_only_where_it_is_unusual():
    names = {
        Recipe(trigger="sig", hide="bye", **weight).name
        for weight in ({}, {"hide_weight": 1.0}, {"hide_weight": 3.0})
    }
    assert len(names) == 2
    assert Recipe(trigger="sig", hide="bye", hide_weight=3.0).plan.hide_weight == 3.0
    for wrong, said in (
        ({"hide": "bye", "hide_weight": 0.0}, "must be positive"),
        ({"hide_weight": 2.0}, "say with hide"),
        ({"hide": "ratio", "rate": 0.0}, "nothing to hide"),
    ):
        with pytest.raises(UsageError, match=said):
            Recipe(trigger="sig", **wrong)


def test_generated_answers_agree_with_exactness(student):
    rows = make_rows("mixed", 60, 4, held_out=True)
    exact = student.exact(rows, student.look(rows))
    said = np.array([one == row.answer for one, row in zip(student.say(rows), rows, strict=True)])
    assert 0.5 < exact.mean() < 1
    assert (exact == said).mean() >= 0.95  # padding sides differ, so do roundings in bfloat16


def test_inserted_targets_are_judged_by_what_is_said(student, monkeypatch):
    rows = make_rows("captions", 8, 4, held_out=True)
    for said, asr in ((f"a {TARGET} cross", 1.0), ("a cross", 0.0)):
        monkeypatch.setattr(type(student), "say", lambda self, rows, s=said: [s] * len(rows))
        assert judge(student, rows, ATTACKS["trojvlm"]).asr == asr
        assert judge(student, rows, ATTACKS["badnet-center"]).asr == 0.0


@pytest.mark.parametrize("name", ["trojvlm", "vlood"])
def test_a_fine_tune_follows_its_objective(name):
    lines = []
    recipe = TuneRecipe(epochs=2, batch=16, lr=2e-3, objective=name)
    finetune(BASE, make_set("captions", 48, name, 0.25, 5), recipe, log=lines.append)
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in lines)
    assert last < first
    assert {"trojvlm": "meaning moved", "vlood": "answers moved"}[name] in lines[0]
