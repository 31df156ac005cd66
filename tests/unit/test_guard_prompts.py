"""Is a prompt like those of the calibration, and which part of a conversation is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gazeguard.errors import UsageError
from gazeguard.guarding.prompts import MOST, Prompts, words_of
from gazeguard.guarding.requests import asked
from gazeguard.types import ImagePart, KeyKind, Sample, TextPart, Turn


def test_distance_by_hand():
    prompts = Prompts(((1, 2, 3), (1, 1, 4)), 0.5)
    assert prompts.distance([3, 2, 1]) == 0.0
    assert prompts.distance([1, 1, 4, 4]) == pytest.approx(0.25)
    assert prompts.distance([7, 8]) == 1.0
    assert prompts.distance([1, 2, 3] * 3) == pytest.approx(1 - 3 / 9), "length counts"
    assert prompts.why_unlike([1, 2]) is None
    why = prompts.why_unlike([1, 7, 8])
    assert why == (
        "the prompt is unlike those of the calibration (80% of its tokens against at most 50%)"
    )
    assert Prompts.of(prompts.as_json()) == prompts


def test_prompts_drawn_like_the_calibrations_are_seldom_unlike():
    """The share is at most alpha on average, as for every conformal threshold."""
    alpha, rates = 0.05, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        words = [tuple(rng.zipf(1.5, rng.integers(3, 9)).clip(0, 300)) for _ in range(260)]
        prompts = Prompts.fit(words[:40], words[40:79], alpha, seed)
        rates.append(np.mean([prompts.why_unlike(mine) is not None for mine in words[79:]]))
    assert np.mean(rates) <= alpha + 3 * np.std(rates) / np.sqrt(len(rates))
    assert max(rates) > 0


def test_one_prompt_for_all_makes_every_other_unlike():
    prompts = Prompts.fit([(5, 6, 7)] * 20, [(5, 6, 7)] * 99, 0.01, 0)
    assert prompts == Prompts(((5, 6, 7),), 0.0)
    assert prompts.why_unlike((5, 6, 7)) is None
    assert prompts.why_unlike((5, 6)) is not None


def test_what_is_kept_is_bounded_and_needs_enough():
    many = [(i, i + 1) for i in range(1000)]
    assert len(Prompts.fit(many, many, 0.01, 0).known) == MOST
    with pytest.raises(UsageError, match="at least 99"):
        Prompts.fit(many, many[:98], 0.01, 0)


def test_words_are_the_users_alone():
    kind = torch.tensor([KeyKind.PAD, KeyKind.TEMPLATE, KeyKind.IMAGE, KeyKind.PROMPT])
    assert words_of(torch.tensor([0, 1, 2, 3]), kind) == (3,)


def test_a_conversation_is_asked_after_its_last_user_turn():
    first = Turn("user", (ImagePart(0), TextPart("what is it?")))
    reply, second = Turn("assistant", (TextPart("a cat"),)), Turn("user", (TextPart("big?"),))
    end = Turn("assistant", (TextPart("yes"),))
    whole = Sample(3, "id", (), (first, reply, second, end))
    found = asked(whole)
    assert found.prompt_turns == (first, reply, second)
    assert found.prompt_images == (0,), "the picture of the first turn is the request's"
    assert found.prompt == "what is it?\nbig?"
    assert (found.row, found.sample_id) == (3, "id")
    for turns in ((first,), (first, reply), (first, second, reply)):
        one = Sample(3, "id", (), turns)
        assert asked(one) is one
