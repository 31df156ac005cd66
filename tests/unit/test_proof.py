"""Which rows a proof takes: of the group, of the others, and further ones to try it on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gazeguard.cleaning.proof import CHOOSE, MAX_ROWS, _Say, groups
from gazeguard.errors import MeasurementError
from gazeguard.methods.rebuild import RECIPIENTS


def judged(answers: list[str], flagged: list[bool]) -> Any:
    """A profile of two kinds of prompt, and a result that removed one group."""
    count = len(answers)
    prompts = ["what colour is it?" if i % 4 else "how many are there?" for i in range(count)]
    profile = SimpleNamespace(
        row=np.arange(count), turn=np.ones(count, int), prompt=prompts, answer=answers
    )
    info = {"groups": [{"phrase": "bad words"}]}
    return profile, SimpleNamespace(info=info, is_flagged=np.array(flagged))


def test_recipients_are_of_all_kinds_and_in_no_mean() -> None:
    answers = ["bad words"] * 20 + ["red"] * 980 + ["some bad words"] * 5
    profile, result = judged(answers, [True] * 20 + [False] * 985)
    (group,) = groups(profile, result, [], seed=0)
    members, others, recipients, named = (
        {row for row, _ in rows}
        for rows in (group.members, group.others, group.recipients, group.named)
    )
    assert group.seen
    assert members == set(range(20))
    assert named == members | set(range(1000, 1005)), "those that were not removed too"
    assert len(others) == 2 * MAX_ROWS
    assert len(recipients) == CHOOSE + RECIPIENTS
    assert not others & recipients
    assert max(others | recipients) < 1000, "those with the words are neither"
    counted = sum(profile.prompt[row].startswith("how") for row in recipients)
    assert counted == len(recipients) // 2, "a quarter of the rows, half of the recipients"


def test_candidates_come_after_what_attention_found_and_not_twice() -> None:
    answers = ["bad words"] * 20 + ["red cat"] * 300 + ["blue dog"] * 300
    profile, result = judged(answers, [True] * 20 + [False] * 600)
    found = groups(profile, result, ["cat", "red cat", "bad words"], seed=0)
    assert [(group.phrase, group.seen) for group in found] == [("bad words", True), ("cat", False)]
    assert len(found[1].members) == MAX_ROWS
    assert len(found[1].named) == 300


def test_what_attention_did_not_remove_is_no_group_of_its() -> None:
    profile, result = judged(["bad words"] * 20 + ["red"] * 100, [False] * 120)
    assert groups(profile, result, [], seed=0) == []


def test_another_seed_draws_other_rows_and_the_same_seed_the_same() -> None:
    profile, result = judged(["bad words"] * 9 + ["red"] * 900, [True] * 9 + [False] * 900)
    first, again, other = (groups(profile, result, [], seed=s)[0] for s in (0, 0, 1))
    assert first == again
    assert first.recipients != other.recipients


@pytest.mark.parametrize("others", [0, 3])
def test_a_set_of_hardly_anything_else_gives_what_there_is(others: int) -> None:
    profile, result = judged(["bad words"] * 9 + ["red"] * others, [True] * 9 + [False] * others)
    (group,) = groups(profile, result, [], seed=0)
    assert len(group.members) == 9
    assert len(group.recipients) == others
    assert group.others == ()


def test_no_group_no_proof() -> None:
    profile, result = judged(["red"] * 4, [False] * 4)
    result.info = {}
    assert groups(profile, result, [], seed=0) == []


@pytest.mark.parametrize(("fits", "asked"), [(16, [16, 4]), (5, [16, 8, 4, 4, 4, 4, 4]), (0, [])])
def test_answers_are_asked_for_as_many_at_once_as_memory_holds(
    fits: int, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def written(target: Any, inputs: list[int], tokens: int) -> list[str]:
        tried.append(len(inputs))
        if len(inputs) > fits:
            raise MemoryError
        return [str(i) for i in inputs]

    monkeypatch.setattr("gazeguard.cleaning.proof.written", written)
    target: Any = SimpleNamespace(
        adapter=None, encode=lambda samples: SimpleNamespace(inputs=list(samples))
    )
    samples: Any = list(range(20))
    say = _Say(target, None, "words", 3)
    if not fits:
        with pytest.raises(MeasurementError, match="a single answer"):
            say.now(samples)
        return
    assert say.now(samples) == [str(i) for i in samples]
    assert tried == asked
