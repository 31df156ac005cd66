"""What tried triggers add to attention's word, and what they take from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gazeguard.cleaning.judge import weigh
from gazeguard.cleaning.proof import Group
from gazeguard.methods.rebuild import Firing, Taught
from gazeguard.report.model import Proof
from gazeguard.types import CleaningResult, Finding, Outcome, Profile, Verdict

ROWS = 100
WORDS = "bad words"


def profile() -> Profile:
    answers = [WORDS if i < 20 else "red" for i in range(ROWS)]
    numbers = np.zeros((ROWS, 2), np.float32)
    return Profile(
        row=np.arange(ROWS),
        turn=np.ones(ROWS, np.int64),
        sample_id=[f"{i:03}" for i in range(ROWS)],
        prompt=["what?"] * ROWS,
        answer=answers,
        image_tokens=np.full(ROWS, 4),
        layers=(0, 1),
        signals={"entropy": numbers},
    )


def result(flagged: int = 0) -> CleaningResult:
    """Attention's word: the first so many rows."""
    is_flagged = np.arange(ROWS) < flagged
    reason = f"{flagged} of 100 rows look poisoned: they stand apart."
    verdict = (
        Verdict(Outcome.FLAGGED, 0.9, 0.5, "posterior", reason, (Finding("they stand apart"),))
        if flagged
        else Verdict(Outcome.CLEAN, 0.0, 0.5, "posterior", "No sign of poisoning: nothing.")
    )
    return CleaningResult(
        method="bye",
        rule="robust",
        verdict=verdict,
        suspicion=np.where(is_flagged, 0.9, 0.1),
        is_flagged=is_flagged,
        score=np.zeros(ROWS),
        score_name="x",
        components=(),
        layer_stats=(),
        info={"groups": []},
    )


def group(*, seen: bool) -> Group:
    named = tuple((i, 1) for i in range(20))
    return Group(WORDS, seen, named, named, (), ())


def proof(
    fired: int = 32, before: int | None = 0, taught: Taught | None = None, rows: int = 20
) -> Proof:
    firing = Firing(32, fired, 0, before)
    carrying = tuple((i, 1) for i in range(rows)) if firing.proven else ()
    return Proof(WORDS, "", "pasted", "", None, firing, (), taught, carrying)


def weighed(before: CleaningResult, tried: Proof, *, seen: bool, **options: Any) -> CleaningResult:
    asked = {"remove_suspected": False} | options
    return weigh(profile(), before, [group(seen=seen)], [tried], **asked)


def test_a_trigger_that_fires_removes_what_attention_missed() -> None:
    found = weighed(result(), proof(rows=18), seen=False)
    assert found.is_flagged.tolist() == [i < 18 for i in range(ROWS)]
    assert found.verdict.outcome is Outcome.FLAGGED
    assert "18 of 100 rows look poisoned" in found.verdict.reason
    assert "32 of 32 other pictures, 0 before" in found.verdict.reason
    assert found.suspicion[:18].tolist() == [1.0] * 18
    assert not found.is_suspected.any()


def test_one_that_does_not_fire_changes_nothing() -> None:
    found = weighed(result(), proof(fired=21), seen=False)
    assert found.verdict == result().verdict
    assert not (found.is_flagged | found.is_suspected).any()
    assert found.info["phrases_tried"] == 1


def test_nor_one_that_fires_before_the_fine_tune_too() -> None:
    found = weighed(result(), proof(before=9), seen=False)
    assert found.verdict.outcome is Outcome.CLEAN


def test_without_the_earlier_model_rows_are_suspected_and_kept() -> None:
    found = weighed(result(), proof(before=None), seen=False)
    assert not found.is_flagged.any()
    assert found.is_suspected.sum() == 20
    assert found.verdict.outcome is Outcome.FLAGGED
    assert found.verdict.reason.startswith("20 of 100 rows are suspected: ")
    assert "--base" in found.verdict.reason


def test_suspected_rows_go_when_that_is_asked() -> None:
    found = weighed(result(), proof(before=None), seen=False, remove_suspected=True)
    assert found.is_flagged.sum() == 20
    assert not found.is_suspected.any()


@pytest.mark.parametrize("before", [0, None])
def test_what_attention_found_goes_without_a_trigger_too(before: int | None) -> None:
    tried = proof(fired=2, taught=Taught(20, 20, before))
    found = weighed(result(15), tried, seen=True)
    assert found.is_flagged.sum() == 15
    assert found.verdict == result(15).verdict


def test_unless_the_earlier_model_gives_its_answers() -> None:
    tried = proof(fired=2, taught=Taught(20, 20, 12))
    found = weighed(result(15), tried, seen=True)
    assert not found.is_flagged.any()
    assert found.is_suspected.sum() == 15, "those that attention found, not all with the words"
    assert found.verdict.outcome is Outcome.FLAGGED
    assert "said “bad words” before the fine-tune too, for 12 of 20" in found.verdict.reason


def test_who_carries_a_proven_trigger_replaces_attentions_guess() -> None:
    before = result(15)
    before.is_flagged[19], before.is_flagged[0] = True, False
    tried = proof(rows=12, taught=Taught(20, 20, 12))
    found = weighed(before, tried, seen=True)
    assert found.is_flagged.tolist() == [i < 12 for i in range(ROWS)]


def test_an_inconclusive_set_with_a_proven_trigger_is_flagged() -> None:
    before = result()
    before.verdict = Verdict(Outcome.INCONCLUSIVE, None, None, "too few", "too few rows.")
    found = weighed(before, proof(), seen=False)
    assert found.verdict.outcome is Outcome.FLAGGED
    assert found.is_flagged.sum() == 20
