"""EntropyScan on made-up sights: what is flagged, what is not, and with which promise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gazeguard.errors import MeasurementError, UsageError
from gazeguard.methods.entropyscan import STATISTICS, Settings, Sight, decide, standing
from gazeguard.methods.entropyscan.sight import paired
from gazeguard.methods.entropyscan.statistics import distance
from gazeguard.types import Outcome

N, L, H, Q = 24, 4, 3, (1.0, 2.0)


def sight(seed: int, move: float = 1.0, planted: float = 0.0, n: int = N) -> Sight:
    """A fine-tune: samples in common, a random move of every number, and perhaps a planted one."""
    pictures, own = np.random.default_rng(0), np.random.default_rng(seed + 1)

    def numbers(*shape: int) -> np.ndarray:
        common = pictures.normal(3, 1, (n, *shape))
        return (common + move * own.normal(0, 0.1, shape)).astype(np.float32)

    parts = {
        "entropy": numbers(L, len(Q)),
        "head_entropy": numbers(L, H, len(Q)),
        "mass": numbers(L, H),
        "ratio": numbers(L, H),
    }
    # What a trigger leaves behind: one head that looks elsewhere on some samples.
    parts["entropy"][::2, 2] -= 2 * planted
    parts["head_entropy"][::2, 2, 1] -= 2 * planted
    parts["mass"][::2, 2] -= planted
    parts["ratio"][::2, 2] -= planted
    ids = tuple(f"s{i}" for i in range(n))
    maps = np.full((L, 2, 2), 0.25, np.float32)
    return Sight(ids, ids, tuple(range(L)), Q, maps=maps, **parts)


BASE = sight(-1, 0.0)
CLEAN = [sight(i) for i in range(19)]


@pytest.mark.parametrize("name", STATISTICS)
def test_every_statistic_finds_a_planted_path(name: str):
    chosen = Settings(statistic=name, layers="all")
    verdict, found = decide(sight(100, planted=1.0), BASE, CLEAN, chosen, 0.05)
    assert verdict.outcome is Outcome.FLAGGED
    assert found.score > found.references.max()
    assert verdict.suspicion == pytest.approx(0.95)
    assert "0 of 19" in verdict.reason
    assert found.moved[0][0].startswith("layer 2")
    assert len(found.moved) == (5 if STATISTICS[name].per_head else 4)


def test_the_head_that_moved_is_named():
    verdict, found = decide(sight(100, planted=1.0), BASE, CLEAN, Settings(), 0.05)
    assert found.moved[0][0] == "layer 2 head 1 entropy"
    assert found.moved[0][1] < -3
    assert any("layer 2 head 1 entropy (-" in finding.message for finding in verdict.evidence)


def test_a_usual_fine_tune_is_clean_though_it_differs_from_the_base():
    usual = sight(50)
    assert np.abs(usual.entropy - BASE.entropy).min() > 0
    verdict, _ = decide(usual, BASE, CLEAN, Settings(), 0.05)
    assert verdict.outcome is Outcome.CLEAN


def test_too_few_references_are_inconclusive_and_say_how_many_are_missing():
    verdict, _ = decide(sight(100, planted=1.0), BASE, CLEAN[:5], Settings(), 0.05)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "19 are needed for 0.05" in verdict.reason
    assert "14 more" in verdict.reason
    alone, found = decide(sight(100, planted=1.0), BASE, [], Settings(), 0.05)
    assert alone.outcome is Outcome.INCONCLUSIVE
    assert alone.suspicion is None
    assert found.score > standing(sight(3), BASE, [], Settings()).score


def far(distance: float, one: Sight) -> Sight:
    return replace(one, moved=distance)


def test_only_references_that_moved_about_as_far_count():
    planted = far(10.0, sight(100, planted=1.0))
    near = [far(6.1 + 0.4 * i, one) for i, one in enumerate(CLEAN)]
    wild = [far(5.9, sight(200, planted=3.0)), far(14.1, sight(201, planted=3.0)), sight(202)]
    verdict, found = decide(planted, BASE, [*wild, *near], Settings(), 0.05)
    assert verdict.outcome is Outcome.FLAGGED
    assert len(found.references) == 19
    told = next(finding for finding in verdict.evidence if "moved 10, " in finding.message)
    assert "those of the benign fine-tunes 6.1 to 13.3; left out: 3" in told.message
    assert len(told.data["references_moved"]) == 22


@pytest.mark.parametrize(("times", "count"), [(0.4, 19), (3.0, 19), (0.4, 1)])
def test_references_that_stopped_short_or_went_too_far_are_inconclusive(times: float, count: int):
    """A benign suspect among shorter ones stands out, a backdoored one among longer ones not."""
    others = [far(18 * times, one) for one in CLEAN[:count]]
    others += [far(18.0, one) for one in CLEAN[count:]]
    for suspect in (sight(50), sight(100, planted=1.0)):
        verdict, _ = decide(far(18.0, suspect), BASE, others, Settings(), 0.05)
        assert verdict.outcome is Outcome.INCONCLUSIVE
        start = "None of 19" if count == 19 else "Only 18 of 19"
        assert f"{start} references moved 0.6 to 1.4 times as far" in verdict.reason
        assert f"its weights moved 18, theirs {18 * times:.3g} to" in verdict.reason
        assert "--make-references 19 and as many --reference-steps" in verdict.reason


def test_a_p_value_that_can_be_no_smaller_says_so():
    told = "p = 0.050, the smallest that 19 can give"
    verdict, _ = decide(sight(100, planted=1.0), BASE, CLEAN, Settings(), 0.05)
    assert told in verdict.reason
    assert any(told in finding.message for finding in verdict.evidence)
    usual, _ = decide(sight(50), BASE, CLEAN, Settings(), 0.05)
    assert "smallest" not in usual.reason + usual.evidence[1].message


def test_the_promise_is_kept_for_benign_models():
    """At alpha = 1/4 and three references, one benign model of four is flagged on average."""
    flagged = 0
    for trial in range(200):
        refs = [sight(1000 + 4 * trial + i) for i in range(3)]
        suspect = sight(1000 + 4 * trial + 3)
        found = standing(suspect, BASE, refs, Settings(statistic="mass", layers="all"))
        flagged += found.p <= 0.25
    assert 0.15 < flagged / 200 < 0.35


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(6)), name=st.sampled_from(sorted(STATISTICS)))
def test_the_order_of_references_changes_nothing(order: list[int], name: str):
    chosen = Settings(statistic=name)
    one = standing(sight(70), BASE, CLEAN[:6], chosen)
    other = standing(sight(70), BASE, [CLEAN[i] for i in order], chosen)
    assert other.score == pytest.approx(one.score, rel=1e-6)
    assert other.p == one.p


def test_samples_are_paired_by_identity():
    shuffled = sight(70).take(np.random.default_rng(1).permutation(N))
    chosen = Settings(statistic="spread")
    one = standing(sight(70), BASE, CLEAN[:4], chosen)
    assert standing(shuffled, BASE, CLEAN[:4], chosen).score == pytest.approx(one.score, rel=1e-5)
    some = paired([BASE, sight(70).take(np.arange(3, 20))])
    assert [len(s) for s in some] == [17, 17]
    assert some[0].sample_id == some[1].sample_id


def test_profile_sees_a_move_against_the_grain():
    """Two heads that always move together: one moving alone is far, both moving is not."""
    rng = np.random.default_rng(0)
    both = rng.normal(0, 1, (19, 1))
    cloud = np.hstack([both, both + rng.normal(0, 0.05, (19, 1))])
    unit = np.ones(2)
    along = distance(np.array([2.0, 2.0]), cloud, unit, "profile")
    against = distance(np.array([1.0, -1.0]), cloud, unit, "profile")
    assert against > along, "half as long, yet further"
    by_features = [distance(np.array(p), cloud, unit, "mass") for p in ([2.0, 2.0], [1.0, -1.0])]
    assert by_features[0] > 1.5 * by_features[1]


def test_layers_and_bad_settings():
    assert Settings(layers="first", share=0.5).chosen(range(7)) == (0, 1, 2, 3)
    assert Settings(layers="last", share=0.25).chosen((3, 7, 11)) == (11,)
    assert Settings(layers=(2, 0)).chosen(range(4)) == (0, 2)
    assert Settings.published().statistic == "entropy"
    assert Settings(q=7.5).probed == (0.5, 1.0, 2.0, 3.0, 7.5)
    for wrong in ({"statistic": "no"}, {"q": -1.0}, {"layers": "middle"}, {"samples": 3}):
        with pytest.raises(UsageError):
            Settings(**wrong)
    with pytest.raises(UsageError, match="choose from"):
        Settings(layers=(9,)).chosen(range(4))


def test_what_cannot_be_compared_is_not_clean():
    with pytest.raises(MeasurementError, match="only 4 samples"):
        decide(sight(5).take(np.arange(4)), BASE, CLEAN, Settings(), 0.05)
    broken = sight(5)
    for name in ("entropy", "head_entropy", "mass", "ratio"):
        getattr(broken, name)[:] = np.nan
    with pytest.raises(MeasurementError, match="no finite numbers"):
        decide(broken, BASE, CLEAN, Settings(), 0.05)


def test_a_sight_survives_the_disk():
    assert math.isnan(Sight.from_bytes(CLEAN[0].to_bytes()).moved)
    again = Sight.from_bytes(far(3.5, CLEAN[0]).to_bytes())
    assert again.moved == 3.5
    assert again.layers == CLEAN[0].layers
    assert again.sample_id == CLEAN[0].sample_id
    assert np.array_equal(again.head_entropy, CLEAN[0].head_entropy)
