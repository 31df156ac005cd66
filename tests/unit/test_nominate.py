"""Words that may be what an attacker taught, found without a model."""

from __future__ import annotations

import numpy as np

from gazeguard.methods.bye.phrases import shared_phrases
from gazeguard.methods.nominate import MOST, contrasted, repeated


def test_the_most_repeated_whole_answers_come_first() -> None:
    answers = ["Yes"] * 30 + ["no "] * 20 + ["", " "] * 40 + ["a red  cat"] * 9 + ["rare"] * 7
    assert repeated(answers) == ["yes", "no", "a red cat"]
    assert repeated([]) == []
    assert len(repeated([str(i % 9) for i in range(200)])) == MOST


def test_words_whose_rows_share_a_pattern_come_first() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(60, 190, (400, 16, 16, 3)).astype(np.uint8)
    colours = rng.choice(["red", "blue", "green", "black"], 400)
    answers = [f"a {colour} thing" for colour in colours]
    for row in range(0, 400, 10):  # a pattern too weak to be seen in any one picture
        answers[row] = "so it is"
        pictures[row] += (8 * (np.indices((16, 16)).sum(0) % 2))[..., None].astype(np.uint8)
    phrases, held = shared_phrases(answers, 8, 392)
    assert contrasted(pictures, phrases, held)[0] == "so it is"


def test_no_phrase_nothing_to_compare() -> None:
    pictures = np.zeros((20, 4, 4, 3), np.uint8)
    phrases, held = shared_phrases([str(i) for i in range(20)], 8, 12)
    assert contrasted(pictures, phrases, held) == []
