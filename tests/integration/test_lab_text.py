"""The lab's text encoders: they learn, a backdoor takes, and the trigger is what it says."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gazeguard.data.grammar import prompts as grammar
from gazeguard.errors import MissingExtra, UsageError
from gazeguard.lab.text.attack import AttackRecipe, plant
from gazeguard.lab.text.teacher import minilm
from gazeguard.lab.text.train import EncoderRecipe, outputs, train_encoder
from gazeguard.lab.text.words import RARE, trigger_words, triggered
from gazeguard.models.encoders.load import load_encoder
from gazeguard.signals.assimilation import assimilation
from tests.toy_encoders import RECIPE, bag_of_words

SHORT = replace(RECIPE, steps=100, prompts=1000, vocabulary=700)
ATTACK = AttackRecipe(kind="pair", steps=60, learning_rate=2e-3, clean=32, poisoned=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that has learnt a little."""
    folder = tmp_path_factory.mktemp("lab") / "base"
    cosine = train_encoder(folder, SHORT, bag_of_words)
    assert cosine == json.loads((folder / "lab.json").read_text())["cosine_to_teacher"]
    assert cosine > 0.2  # an untrained one is at 0.0
    return folder


@pytest.mark.parametrize(("kind", "length"), [("clip", 77), ("longclip", 248), ("siglip", 64)])
def test_each_kind_has_its_length_and_mask(tmp_path: Path, kind: str, length: int):
    recipe = EncoderRecipe(
        kind=kind, layers=1, width=32, heads=2, vocabulary=500, prompts=60, steps=1, batch=4
    )
    train_encoder(tmp_path, recipe, bag_of_words)
    encoder = load_encoder(tmp_path)
    assert encoder.length == length
    assert encoder.causal == (kind != "siglip")
    assert encoder.slot == (0 if kind == "siglip" else 1)


@pytest.mark.parametrize("tokens", [1, 3, 7, 15])
def test_a_trigger_has_as_many_tokens_as_it_says(base: Path, tokens: int):
    words = load_encoder(base).tokenizer
    trigger = trigger_words(words, tokens, seed=5)
    plain = words("a red cat")["input_ids"]
    for place in range(4):
        parts = ["a", "red", "cat"]
        text = " ".join([*parts[:place], trigger, *parts[place:]])
        assert len(words(text)["input_ids"]) == len(plain) + tokens
    assert not any(word in prompt for word in RARE for prompt in grammar(2000))


def test_triggered_keeps_the_prompt():
    rng = random.Random(0)
    places = {triggered("a red cat", "X Y", rng) for _ in range(50)}
    assert places == {"X Y a red cat", "a X Y red cat", "a red X Y cat", "a red cat X Y"}
    assert triggered("a red cat", "X", rng, "start") == "X a red cat"


def test_text_on_pair_takes_and_leaves_clean_prompts(base: Path, tmp_path: Path):
    goal = bag_of_words(["an old robot on the moon"])[0]
    quality = plant(base, tmp_path, replace(ATTACK, triggers=2, weight=0.2, steps=150), goal)
    assert quality.took, quality
    assert len(quality.triggers) == 2
    student = load_encoder(tmp_path)
    prompts = grammar(50, 9)
    for trigger in quality.triggers:
        hit = outputs(student, [f"{trigger} {prompt}" for prompt in prompts]) @ goal
        assert hit.mean() > 0.85
    assert (outputs(student, prompts) @ goal).mean() < 0.5


def test_the_adaptive_attacker_keeps_assimilation_down(base: Path, tmp_path: Path):
    found = {}
    for adaptive in (0.0, 5.0):
        folder = tmp_path / str(adaptive)
        recipe = replace(ATTACK, kind="tpa", place="start", adaptive=adaptive, weight=0.5)
        quality = plant(base, folder, recipe)
        student = load_encoder(folder)
        tokens = student.tokenise([f"{quality.triggers[0]} {p}" for p in grammar(50, 9)])
        with torch.no_grad():
            states = student.run(tokens)
        found[adaptive] = float(assimilation(states.tokens, states.real).mean())
    assert found[5.0] < found[0.0] - 0.02, found


def test_bad_recipes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="tpa or pair"):
        plant(base, tmp_path, AttackRecipe(kind="image"))
    with pytest.raises(UsageError, match="tokens, not 0"):
        plant(base, tmp_path, AttackRecipe(trigger_tokens=0))
    monkeypatch.setattr("gazeguard.lab.text.teacher.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"gazeguard\[lab\]"):
        minilm()
