"""Questions behind one reading of a picture are answered as each by itself, in every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gazeguard.errors import RowError, UsageError
from gazeguard.lab import tiny
from gazeguard.models.answers import answer_ids, answered
from gazeguard.models.load import load
from gazeguard.probe import branch as module
from gazeguard.probe.branch import branch, with_question
from gazeguard.types import ImagePart, Sample, TextPart, Turn

from .conftest import picture

TOLERANCE = 1e-4
# Words that see those behind them, and layers that keep a state, cannot be read once for all.
APART = {"paligemma", "qwen3_5"}
families = pytest.mark.parametrize("family", tiny.FAMILIES)


def said(role: str, *parts: str | int) -> Turn:
    return Turn(role, tuple(ImagePart(p) if isinstance(p, int) else TextPart(p) for p in parts))


def samples() -> list[Sample]:
    """One picture; two, after an answer; the picture behind the words of an earlier turn."""
    of = [
        ((said("user", 0, "what is in the image?"), said("assistant", "a square")), [(64, 64)]),
        ((said("user", "look at", 0, "and", 1, "colour?"),), [(40, 60), (64, 64)]),
        ((said("user", 0, "how many?"),), [(50, 90)]),
    ]
    return [
        Sample(row, f"id-{row}", tuple(picture(*s, seed=10 * row + i) for i, s in enumerate(on)), t)
        for row, (t, on) in enumerate(of)
    ]


QUESTIONS = [
    ["how many?", "which colour is it, the one of the two", "is it a square?"],
    ["what?", "how many of them are left?"],
    ["what is in the image?"],
]
ANSWERS = ["red", "a small red square", "two"]


def alone(target, sample, question, answer, tokens):
    """Log-probability per token, greedy agreement, and the model's own words, one prompt alone."""
    asked = with_question(sample, question)
    inputs = target.encode([asked]).inputs
    (told,) = answer_ids(target, [answer])
    told = told[:tokens]
    with torch.inference_mode():
        logits = target.model(**answered(target, inputs, [told])).logits[0, -len(told) - 1 : -1]
        written = target.base.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    scores = logits.log_softmax(-1)
    mean = scores[torch.arange(len(told)), torch.tensor(told)].mean()
    new = written[0, inputs["input_ids"].shape[1] :]
    text = target.processor.tokenizer.decode(new, skip_special_tokens=True)
    return float(mean), scores.argmax(-1).tolist() == told, text.strip()


@families
@pytest.mark.parametrize("batch_size", [2, 32])
def test_as_a_prompt_of_its_own(tiny_target, family, batch_size):
    target = tiny_target(family)
    rows = samples()
    keep = [s.row for s in rows]
    found = branch(
        target,
        rows,
        [QUESTIONS[i] for i in keep],
        [ANSWERS[i] for i in keep],
        tokens=5,
        write=True,
        batch_size=batch_size,
    )
    for i, one in zip(keep, found, strict=True):
        assert one.shared == (family not in APART)
        for j, question in enumerate(QUESTIONS[i]):
            mean, agrees, text = alone(target, samples()[i], question, ANSWERS[i], 5)
            assert abs(float(one.log_probability[j]) - mean) <= TOLERANCE
            assert bool(one.agrees[j]) == agrees
            assert one.texts[j] == text


@pytest.mark.parametrize("right", [True, False])
def test_an_untested_model_is_compared_with_itself(tiny_folder, monkeypatch, right):
    target = load(tiny_folder("llava"))
    monkeypatch.setattr(module, "needs_check", lambda target: True)
    if not right:
        monkeypatch.setattr(module, "_next_position", lambda target, real: real.sum(1) * 0 + 7)
    asked = (target, samples(), QUESTIONS, ANSWERS)
    for _ in range(2):
        found = branch(*asked, tokens=5)
        assert [one.shared for one in found] == [right] * 3
        for i, one in enumerate(found):
            mean, _, _ = alone(target, samples()[i], QUESTIONS[i][0], ANSWERS[i], 5)
            assert abs(float(one.log_probability[0]) - mean) <= TOLERANCE


def test_words_go_where_the_words_were():
    first, last, earlier = Sample(0, "", (), ()), Sample(1, "", (), ()), Sample(2, "", (), ())
    for sample, turns, wanted in (
        (first, (said("user", "in", "short", 0),), (said("user", "new", 0),)),
        (last, (said("user", "see", 0, "and", 1, "what?"),), (said("user", 0, 1, "new"),)),
        (
            earlier,
            (said("system", "be brief"), said("user", 0), said("assistant", "a cat")),
            (said("system", "be brief"), said("user", 0, "new"), said("assistant", "a cat")),
        ),
    ):
        sample = replace(sample, turns=turns)
        assert with_question(sample, "new").turns == wanted


def test_a_picture_behind_the_question_is_read_again(tiny_target):
    target = tiny_target("llava")
    behind = Sample(0, "id", (picture(64, 64),), (said("user", "colour?", 0),))
    before = replace(behind, row=1, turns=(said("user", 0, "colour?"),))
    found = branch(target, [behind, before], [["how many?", "what?"]] * 2, ["two"] * 2, write=True)
    assert [one.shared for one in found] == [False, True]
    for sample, one in zip((behind, before), found, strict=True):
        mean, agrees, text = alone(target, sample, "what?", "two", 8)
        assert abs(float(one.log_probability[1]) - mean) <= TOLERANCE
        assert bool(one.agrees[1]) == agrees
        assert one.texts[1] == text


@pytest.mark.parametrize(
    ("questions", "answers", "tokens"),
    [([["what?"]], [], 8), ([[]], ["red"], 8), ([["what?"]], ["red"], 0)],
)
def test_what_cannot_be_asked_is_refused(tiny_target, questions, answers, tokens):
    with pytest.raises(UsageError):
        branch(tiny_target("llava"), samples()[2:], questions, answers, tokens=tokens)


def test_a_row_that_asks_nothing_is_named(tiny_target):
    silent = replace(samples()[2], row=7, turns=(said("assistant", "red"),))
    with pytest.raises(RowError, match="row 7 asks nothing"):
        branch(tiny_target("llava"), [silent], [["what?"]], ["red"])
