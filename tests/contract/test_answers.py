"""Every answer of a conversation, read in one pass, is what a pass that ends there would show."""

from __future__ import annotations

import pytest
import torch

from gazeguard.errors import ModelError
from gazeguard.lab import tiny
from gazeguard.probe.attention import attend
from gazeguard.types import ImagePart, KeyKind, Sample, TextPart, Turn

from .conftest import picture

TOLERANCE = 1e-5
families = pytest.mark.parametrize("family", tiny.FAMILIES)
# The tiny Gemma's template names the model "assistant" in earlier turns, unlike the real one's.
GEMMA_ROLE = "{{ 'model' if m['role'] == 'assistant' else m['role'] }}"


def said(role: str, *parts: str | int) -> Turn:
    return Turn(role, tuple(ImagePart(p) if isinstance(p, int) else TextPart(p) for p in parts))


def conversations() -> list[Sample]:
    """Three answers about two pictures; one answer; a first answer before the picture."""
    first = (
        said("user", 0, "what is in the image?"),
        said("assistant", "a red square"),
        said("user", "and in", 1, "this one?"),
        said("assistant", "two circles"),
        said("user", "which is larger?"),
        said("assistant", "the square, by far"),
        said("user", "thanks"),
    )
    second = (said("user", 0, "colour?"), said("assistant", "not part of the prompt"))
    third = (
        said("user", "hello"),
        said("assistant", "hi"),
        said("user", "what is", 0),
        said("assistant", "green"),
        said("user", "sure?"),
        said("assistant", "yes"),
    )
    sizes = ([(40, 60), (64, 64)], [(64, 64)], [(50, 90)])
    return [
        Sample(row, f"id-{row}", tuple(picture(*s, seed=10 * row + i) for i, s in enumerate(of)), t)
        for row, (t, of) in enumerate(zip((first, second, third), sizes, strict=True))
    ]


ASKED = [(0, 1), (0, 2), (0, 3), (1, 1), (2, 2), (2, 3)]  # row and turn


def compare(target, padding_side, source):
    samples = conversations()
    asked = [each for sample in samples for each in sample.asked]
    assert [(each.row, each.turn) for each in asked] == ASKED
    encoded = target.encode(samples, padding_side, every_answer=True)
    assert encoded.source == source
    assert encoded.sample_id == tuple(each.sample_id for each in asked)
    together = attend(target, encoded, reduce_heads=False)
    assert together.finite.all()
    lines = source or range(len(asked))
    decode = target.processor.tokenizer.decode
    for i, each in enumerate(asked):
        alone = target.encode([each], padding_side)
        expected = attend(target, alone, reduce_heads=False)
        kind = encoded.key_kind[i]
        real = kind != KeyKind.PAD
        ids = encoded.inputs["input_ids"][lines[i]]
        assert torch.equal(ids[real], alone.inputs["input_ids"][0])
        worst = (together.weights[i][..., real] - expected.weights[0]).abs().max().item()
        assert worst < TOLERANCE, f"answer {each.turn} of row {each.row} is off by {worst}"
        assert (together.weights[i][..., ~real] == 0).all()
        pictures = alone.key_kind[0] == KeyKind.IMAGE
        assert torch.equal(kind[real] == KeyKind.IMAGE, pictures)
        assert encoded.images[i] == alone.images[0]
        words = each.prompt.replace(" ", "")
        assert decode(ids[kind == KeyKind.PROMPT]).replace(" ", "") == words


@families
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_one_pass_shows_what_separate_passes_show(family, padding_side, tiny_target):
    apart = family in ("paligemma", "gemma3")
    compare(tiny_target(family), padding_side, () if apart else (0, 0, 0, 1, 2, 2))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_pictures_that_see_both_ways_are_before_the_answer(padding_side, tiny_target, monkeypatch):
    target = tiny_target("gemma3")
    template = target.processor.chat_template.replace("{{ m['role'] }}", GEMMA_ROLE)
    monkeypatch.setattr(target.processor, "chat_template", template)
    compare(target, padding_side, (0, 0, 0, 1, 2, 2))


@families
def test_one_answer_gives_the_inputs_of_today(family, tiny_target, samples):
    target = tiny_target(family)
    plain, every = target.encode(samples), target.encode(samples, every_answer=True)
    assert every.source == ()
    assert plain.inputs.keys() == every.inputs.keys()
    for name, value in plain.inputs.items():
        assert torch.equal(value, every.inputs[name]), name
    assert torch.equal(plain.key_kind, every.key_kind)
    assert (plain.images, plain.sample_id) == (every.images, every.sample_id)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_answers_that_begin_inside_of_a_token_get_passes_of_their_own(
    padding_side, tiny_target, monkeypatch
):
    monkeypatch.setattr("gazeguard.models.target.answer_tokens", lambda *_: None)
    compare(tiny_target("llava"), padding_side, ())


def test_a_family_that_sees_ahead_is_not_believed(tiny_target, monkeypatch):
    """PaliGemma's prompt tokens all see each other; a family that nobody told us about would."""
    target = tiny_target("paligemma")
    monkeypatch.setattr(target.family, "sees_ahead", False)
    turns = (said("user", 0, "what?"), said("assistant", "a"), said("user", "and?"))
    sample = Sample(0, "id", (picture(40, 60),), (*turns, said("assistant", "b")))
    encoded = target.encode([sample], every_answer=True)
    assert encoded.source == (0, 0)
    with pytest.raises(ModelError, match="looks at what comes after an answer"):
        attend(target, encoded)
