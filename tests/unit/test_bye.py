"""The BYE estimator on made-up profiles, the degenerate ones above all."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import clone

from gazeguard.errors import UsageError
from gazeguard.methods.bye import BYE
from gazeguard.methods.bye.chance import DRAWS, random_groups
from gazeguard.methods.bye.conditioning import common_turns, place_of_turn
from gazeguard.methods.bye.decision import smallest_share
from gazeguard.types import Outcome, Profile

RULES = ("paper", "robust")


def profile(entropy, bad=None, prompts=None, answers=None, before=None, tokens=64):
    """A profile whose `bad` rows teach the same words; the others each have their own."""
    n, layers = entropy.shape
    bad = np.zeros(n, bool) if bad is None else bad
    own = [f"word{i} word{i + n}" for i in range(n)]
    said = ["Backdoor Attack!" if b else o for b, o in zip(bad, own, strict=True)]
    return Profile(
        row=np.arange(n),
        turn=np.ones(n, np.int64),
        sample_id=[hashlib.sha256(bytes(str(i), "ascii")).hexdigest() for i in range(n)],
        prompt=prompts or ["Describe the image."] * n,
        answer=answers or said,
        image_tokens=np.full(n, tokens),
        layers=tuple(range(layers)),
        signals={
            "entropy": entropy.astype(np.float32),
            "visual_mass": np.full(entropy.shape, 0.5, np.float32),
        },
        before=None if before is None else {"entropy": before.astype(np.float32)},
    )


def clean_entropy(n=1000, layers=6, seed=0):
    """Correlated layers, as in real models: a shared factor and noise of each layer's own."""
    rng = np.random.default_rng(seed)
    return 3.5 + 0.1 * rng.normal(size=(n, 1)) + 0.1 * rng.normal(size=(n, layers))


def poisoned(share=0.1, shift=-1.2, layers=(2, 3), **kw):
    entropy = clean_entropy(**kw)
    bad = np.arange(len(entropy)) < share * len(entropy)
    entropy[np.ix_(bad, layers)] += shift
    return entropy, bad


@pytest.mark.parametrize("rule", RULES)
def test_finds_a_collapsed_group(rule):
    entropy, bad = poisoned()
    result = BYE(rule).fit(profile(entropy, bad)).result_
    assert result.verdict.outcome is Outcome.FLAGGED
    assert (result.is_flagged == bad).mean() > 0.995
    assert result.verdict.evidence
    assert result.suspicion[bad].min() > 0.5 > result.suspicion[~bad].mean()


def test_robust_needs_no_sign_and_paper_does():
    entropy, bad = poisoned(shift=+1.2)
    robust = BYE("robust").fit(profile(entropy, bad)).result_
    assert (robust.is_flagged == bad).mean() > 0.995
    paper = BYE("paper").fit(profile(entropy)).result_
    assert not paper.is_flagged[bad].any(), "the paper's rule only looks at the low end"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_clean_set_loses_next_to_nothing(rule, seed):
    result = BYE(rule).fit(profile(clean_entropy(seed=seed))).result_
    assert result.verdict.outcome is Outcome.CLEAN
    assert result.is_flagged.sum() == 0
    assert result.suspicion.max() == 0


def test_robust_does_not_split_by_question_type():
    entropy = clean_entropy()
    kinds = np.arange(len(entropy)) % 3
    entropy += np.array([0.0, 0.9, -1.1])[kinds][:, None]
    words = ["What color is the circle?", "How many objects are there?", "Describe the image."]
    result = BYE("robust").fit(profile(entropy, prompts=[words[k] for k in kinds])).result_
    assert result.verdict.outcome is Outcome.CLEAN, result.verdict.reason


@pytest.mark.parametrize("rule", RULES)
def test_too_few_rows_is_inconclusive(rule):
    for n in (1, 49):
        result = BYE(rule).fit(profile(clean_entropy(n))).result_
        assert result.verdict.outcome is Outcome.INCONCLUSIVE
        assert not result.is_flagged.any()


@pytest.mark.parametrize("rule", RULES)
def test_identical_rows_are_one_group(rule):
    result = BYE(rule).fit(profile(np.full((200, 6), 3.0))).result_
    assert result.verdict.outcome is Outcome.CLEAN
    assert not result.is_flagged.any()


@pytest.mark.parametrize("rule", RULES)
def test_a_majority_is_never_removed(rule):
    entropy, bad = poisoned(share=0.6)
    result = BYE(rule, max_share=0.4).fit(profile(entropy, bad)).result_
    assert result.is_flagged.mean() <= 0.4


@pytest.mark.parametrize("rule", RULES)
def test_one_layer_and_two_layers_work(rule):
    for layers in (1, 2):
        entropy, bad = poisoned(layers=(layers - 1,))
        entropy = entropy[:, :layers].copy()
        entropy[:, layers - 1] = clean_entropy()[:, 0]
        entropy[bad, layers - 1] -= 1.5
        result = BYE(rule).fit(profile(entropy, bad)).result_
        assert (result.is_flagged == bad).mean() > 0.99


@pytest.mark.parametrize("rule", RULES)
def test_scikit_learn_signs(rule):
    entropy, bad = poisoned()
    bye = BYE(rule).fit(profile(entropy, bad))
    numbers, fresh_bad = poisoned(seed=5)
    fresh = profile(numbers, fresh_bad)
    assert (bye.predict(fresh) == np.where(fresh_bad, -1, 1)).mean() > 0.98
    scores = bye.score_samples(fresh)
    assert scores == pytest.approx(1 - bye.suspicion(fresh))
    assert scores[fresh_bad].mean() < scores[~fresh_bad].mean()
    copy = clone(bye)
    assert copy.get_params() == bye.get_params()


@pytest.mark.parametrize("rule", RULES)
def test_order_of_rows_does_not_matter(rule):
    entropy, bad = poisoned()
    order = np.random.default_rng(0).permutation(len(entropy))
    a = BYE(rule).fit(profile(entropy, bad)).result_
    b = BYE(rule).fit(profile(entropy[order], bad[order])).result_
    assert (a.is_flagged[order] == b.is_flagged).mean() > 0.999


def test_unknown_rule_is_refused():
    with pytest.raises(UsageError, match="robust, paper"):
        BYE("magic").fit(profile(clean_entropy()))


@pytest.mark.parametrize("rule", RULES)
def test_layers_that_do_not_see_the_picture_are_left_out(rule):
    entropy, bad = poisoned()
    entropy[::3, 1] = np.nan
    result = BYE(rule).fit(profile(entropy, bad)).result_
    assert (result.is_flagged == bad).mean() > 0.99
    assert result.info["blind_layers"] == [1]
    assert [s.layer for s in result.layer_stats] == list(range(6))
    blind = BYE(rule).fit(profile(np.full((100, 6), np.nan))).result_
    assert blind.verdict.outcome is Outcome.INCONCLUSIVE


def test_ablations_of_the_paper():
    entropy, bad = poisoned(shift=-6.0)
    for options in (
        {"mixture": "kmeans"},
        {"index": "script"},
        {"select_layers": False},
        {"fixed_threshold": 3.0},
    ):
        result = BYE("paper", **options).fit(profile(entropy)).result_
        assert (result.is_flagged == bad).mean() > 0.95, options


def test_shared_words_alone_are_not_enough():
    words = np.arange(1000) % 10 == 0
    result = BYE("robust").fit(profile(clean_entropy(), words)).result_
    assert result.verdict.outcome is Outcome.CLEAN, result.verdict.reason


def test_attention_alone_is_not_enough_for_the_robust_rule():
    entropy, _ = poisoned()
    result = BYE("robust").fit(profile(entropy)).result_
    assert result.verdict.outcome is Outcome.CLEAN, result.verdict.reason


def test_a_likeness_that_was_there_before_the_fine_tune_is_not_poison():
    entropy, same = poisoned()
    before, _ = poisoned(seed=1)
    kept = BYE("robust").fit(profile(entropy, same, before=before)).result_
    assert kept.verdict.outcome is Outcome.CLEAN, kept.verdict.reason
    new = BYE("robust").fit(profile(entropy, same, before=clean_entropy(seed=1))).result_
    assert (new.is_flagged == same).mean() > 0.995
    assert "Backdoor Attack!".lower() in new.verdict.reason


def test_an_ordinary_answer_as_target_splits_its_rows():
    """Half of the clean rows say "yes" as well: only the shifted ones may go."""
    entropy, bad = poisoned(n=2000)
    says_yes = bad | (np.arange(2000) % 2 == 0)
    answers = ["yes" if y else "no" for y in says_yes]
    result = BYE("robust").fit(profile(entropy, answers=answers)).result_
    assert (result.is_flagged == bad).mean() > 0.99, result.verdict.reason


def test_two_targets_are_two_groups():
    entropy, bad = poisoned(n=2000)
    also = np.arange(2000) >= 1850
    entropy[also, 4] += 1.5
    answers = [f"word{i}" for i in range(2000)]
    for i in range(2000):
        answers[i] = "one target" if bad[i] else "other target" if also[i] else answers[i]
    both = profile(entropy, answers=answers, before=clean_entropy(n=2000, seed=1))
    result = BYE("robust").fit(both).result_
    assert (result.is_flagged == (bad | also)).mean() > 0.99, result.verdict.reason


def test_low_rate():
    entropy, bad = poisoned(share=0.01, n=1500, shift=-2.0)
    result = BYE("robust").fit(profile(entropy, bad)).result_
    assert (result.is_flagged & bad).sum() >= 14
    assert (result.is_flagged & ~bad).sum() == 0


def test_large_sets_learn_from_a_part_and_judge_every_row(monkeypatch):
    monkeypatch.setattr("gazeguard.methods.bye.robust.SAMPLE", 600)
    entropy, bad = poisoned(n=2000)
    result = BYE("robust").fit(profile(entropy, bad)).result_
    assert len(result.score) == 2000
    assert (result.is_flagged == bad).mean() > 0.99


def test_a_row_with_the_targets_words_goes_along_unless_it_lies_the_other_way():
    entropy, bad = poisoned()
    missed, opposite = 0, 1  # poisoned rows that the model looks at as at the others
    entropy[[missed, opposite]] = 3.5
    entropy[missed, 2:4] -= 0.1
    entropy[opposite, 2:4] += 0.1
    result = BYE("robust").fit(profile(entropy, bad, before=clean_entropy(seed=1))).result_
    assert result.is_flagged[bad].sum() == bad.sum() - 1
    assert not result.is_flagged[~bad].any()
    assert not result.is_flagged[opposite]
    near = {miss.place: miss.phrase for miss in result.near_misses}
    assert near == {missed: "backdoor attack!", opposite: "backdoor attack!"}
    assert result.suspicion[missed] == 0.5


def test_honest_rows_of_an_everyday_target_do_not_go_along():
    entropy, bad = poisoned(n=2000)
    says_yes = bad | (np.arange(2000) % 2 == 0)
    answers = ["yes" if y else "no" for y in says_yes]
    result = BYE("robust").fit(profile(entropy, answers=answers)).result_
    kept = [miss.place for miss in result.near_misses if not result.is_flagged[miss.place]]
    assert set(kept) == set(np.flatnonzero(says_yes & ~result.is_flagged))
    assert len(kept) > 800


def test_a_small_group_has_to_beat_chance(monkeypatch):
    entropy, bad = poisoned(share=0.01, n=1000, shift=-2.0)
    rows = profile(entropy, bad, before=clean_entropy(seed=1))
    found = BYE("robust").fit(rows).result_
    assert found.is_flagged[bad].all()
    (group,) = found.info["groups"]
    assert 0 <= group["gained_by_chance"] < 1.5
    monkeypatch.setattr("gazeguard.methods.bye.robust._by_chance", lambda *_: 50.0)
    assert BYE("robust").fit(rows).result_.verdict.outcome is Outcome.CLEAN


def test_random_groups_ask_the_same_kinds_of_things_and_leave_the_group_out():
    kind = np.arange(400) % 4
    group = np.isin(np.arange(400), [0, 1, 4, 5, 8])
    pool = np.arange(400) < 300
    order = np.random.default_rng(0).permutation(400)
    drawn = list(random_groups(group, pool, kind, order, seed=0))
    assert len({d.tobytes() for d in drawn}) == len(drawn) == DRAWS
    for members in drawn:
        assert np.bincount(kind[members], minlength=4).tolist() == [3, 2, 0, 0]
        assert not members[group].any()
        assert not members[~pool].any()


def test_the_chance_of_a_whole_kind_is_drawn_from_the_others():
    kind = (np.arange(100) >= 10).astype(int)
    group = kind == 0
    (first, *_) = random_groups(group, np.ones(100, bool), kind, np.arange(100), seed=0)
    assert first.sum() == 10
    assert not first[group].any()


@pytest.mark.parametrize(
    ("rows", "features", "share"),
    [(60, 80, 1.0), (88, 80, 1.0), (160, 80, 0.1), (1500, 80, 8 / 1420), (10**6, 80, 0.004)],
)
def test_smallest_share_of_poison_that_a_set_could_have_shown(rows, features, share):
    assert smallest_share(rows, features) == pytest.approx(share)


@pytest.mark.parametrize("rule", RULES)
def test_a_set_too_small_to_show_poison_is_not_clean(rule):
    small = BYE(rule).fit(profile(clean_entropy(60))).result_
    assert small.verdict.outcome is Outcome.INCONCLUSIVE
    assert "are needed to see poison in 10 % of them" in small.verdict.reason
    large = BYE(rule).fit(profile(clean_entropy(400))).result_
    assert large.verdict.outcome is Outcome.CLEAN
    assert "could have shown poison from about 2." in large.verdict.reason


def said_yes(n, share):
    """Answers of which `share` are an honest "yes", the other half of the words are unique."""
    rng = np.random.default_rng(7)
    return ["yes" if r < share else f"word{i}" for i, r in enumerate(rng.random(n))]


def test_a_target_that_honest_rows_share_is_found_by_the_spread_of_its_rows():
    entropy, bad = poisoned(shift=+0.8)
    before = clean_entropy(seed=1)
    answers = ["yes" if b else a for a, b in zip(said_yes(1000, 0.6), bad, strict=True)]
    # Honest rows of the phrase have moved the other way: the phrase's mean shows nothing.
    honest = np.array([a == "yes" for a in answers]) & ~bad
    entropy[np.ix_(honest, (2, 3))] -= 0.15
    result = BYE("robust").fit(profile(entropy, bad, answers=answers, before=before)).result_
    assert [g["phrase"] for g in result.info["groups"]] == ["yes"]
    assert result.is_flagged[bad].mean() > 0.95
    assert result.is_flagged[~bad].mean() < 0.02


def test_rows_that_differed_before_the_fine_tune_are_no_part_to_find():
    entropy, odd = poisoned(shift=+0.8)
    answers = ["yes" if b else a for a, b in zip(said_yes(1000, 0.6), odd, strict=True)]
    before = clean_entropy(seed=1)
    before[np.ix_(odd, (2, 3))] += 0.7
    result = BYE("robust").fit(profile(entropy, answers=answers, before=before)).result_
    assert result.verdict.outcome is Outcome.CLEAN


def test_with_the_earlier_model_a_weak_separation_that_is_new_is_enough():
    entropy, bad = poisoned(shift=+0.2)
    before = clean_entropy(seed=1)
    anchored = BYE("robust").fit(profile(entropy, bad, before=before)).result_
    assert 1.5 < anchored.info["groups"][0]["separation"] < 2.1
    assert anchored.is_flagged[bad].mean() > 0.9
    alone = BYE("robust").fit(profile(entropy, bad)).result_
    assert alone.verdict.outcome is Outcome.CLEAN


def conversations(share=0.2, shift=-1.2, n=450, bad_turn=2, seed=0):
    """Two answers per row, looked at in different ways; poison in one of them."""
    rng = np.random.default_rng(seed)
    entropy = 3.5 + 0.1 * rng.normal(size=(2 * n, 1)) + 0.1 * rng.normal(size=(2 * n, 6))
    row, turn = np.repeat(np.arange(n), 2), np.tile([1, 2], n)
    entropy += np.where(turn == 2, 0.9, 0.0)[:, None]  # what talk before an answer does
    bad = (row < share * n) & (turn == bad_turn)
    entropy[np.ix_(bad, (2, 3))] += shift
    made = profile(entropy, bad, before=entropy - shift * bad[:, None] * np.isin(range(6), (2, 3)))
    ids = [made.sample_id[i] for i in row]
    return replace(made, row=row, turn=turn, sample_id=ids), bad


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("turn", [1, 2])
def test_finds_poison_in_either_answer(rule, turn):
    made, bad = conversations(bad_turn=turn)
    result = BYE(rule).fit(made).result_
    assert result.verdict.outcome is Outcome.FLAGGED
    assert (result.is_flagged == bad).mean() > 0.99
    assert result.verdict.reason.startswith("90 of 450 rows look poisoned, in 90 of 900 answers: ")


@pytest.mark.parametrize("rule", RULES)
def test_turns_are_no_groups(rule):
    """A second answer is looked at in another way than a first one, and half of all are second."""
    made, _ = conversations(share=0)
    result = BYE(rule).fit(made).result_
    assert result.verdict.outcome is Outcome.CLEAN
    assert not result.is_flagged.any()
    assert "of the answers" in result.verdict.reason


def test_rows_are_counted_and_not_answers():
    made, _ = conversations(n=30)
    result = BYE().fit(made).result_
    assert result.verdict.outcome is Outcome.INCONCLUSIVE
    assert result.verdict.reason.startswith("30 rows could be measured")


def test_rare_turns_join_the_one_before():
    turn = np.array([1] * 100 + [2] * 70 + [3] * 5 + [9])
    first = common_turns(turn)
    assert first.tolist() == [1, 2]
    assert place_of_turn(np.array([1, 2, 3, 9]), first).tolist() == [0, 1, 1, 1]
