"""The BYE estimator on made-up profiles, the degenerate ones above all."""

import numpy as np
import pytest
from sklearn.base import clone

from gazeguard.errors import UsageError
from gazeguard.methods.bye import BYE
from gazeguard.types import Outcome, Profile

RULES = ("paper", "robust")


def profile(entropy, prompts=None, tokens=64):
    n, layers = entropy.shape
    return Profile(
        row=np.arange(n),
        sample_id=[f"{i:064x}" for i in range(n)],
        prompt=prompts or ["Describe the image."] * n,
        image_tokens=np.full(n, tokens),
        layers=tuple(range(layers)),
        signals={
            "entropy": entropy.astype(np.float32),
            "visual_mass": np.full(entropy.shape, 0.5, np.float32),
        },
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
    result = BYE(rule).fit(profile(entropy)).result_
    assert result.verdict.outcome is Outcome.FLAGGED
    assert (result.is_flagged == bad).mean() > 0.995
    assert result.verdict.evidence
    assert result.suspicion[bad].min() > 0.5 > result.suspicion[~bad].mean()


def test_robust_needs_no_sign_and_paper_does():
    entropy, bad = poisoned(shift=+1.2)
    robust = BYE("robust").fit(profile(entropy)).result_
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
    result = BYE("robust").fit(profile(entropy, [words[k] for k in kinds])).result_
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
    entropy, _ = poisoned(share=0.7)
    result = BYE(rule, max_share=0.4).fit(profile(entropy)).result_
    assert result.is_flagged.mean() <= 0.4


@pytest.mark.parametrize("rule", RULES)
def test_one_layer_and_two_layers_work(rule):
    for layers in (1, 2):
        entropy, bad = poisoned(layers=(layers - 1,))
        entropy = entropy[:, :layers].copy()
        entropy[:, layers - 1] = clean_entropy()[:, 0]
        entropy[bad, layers - 1] -= 1.5
        result = BYE(rule).fit(profile(entropy)).result_
        assert (result.is_flagged == bad).mean() > 0.99


@pytest.mark.parametrize("rule", RULES)
def test_scikit_learn_signs(rule):
    entropy, bad = poisoned()
    bye = BYE(rule).fit(profile(entropy))
    fresh, fresh_bad = poisoned(seed=5)
    assert (bye.predict(profile(fresh)) == np.where(fresh_bad, -1, 1)).mean() > 0.98
    scores = bye.score_samples(profile(fresh))
    assert scores == pytest.approx(1 - bye.suspicion(profile(fresh)))
    assert scores[fresh_bad].mean() < scores[~fresh_bad].mean()
    copy = clone(bye)
    assert copy.get_params() == bye.get_params()


@pytest.mark.parametrize("rule", RULES)
def test_order_of_rows_does_not_matter(rule):
    entropy, _ = poisoned()
    order = np.random.default_rng(0).permutation(len(entropy))
    a = BYE(rule).fit(profile(entropy)).result_
    b = BYE(rule).fit(profile(entropy[order])).result_
    assert (a.is_flagged[order] == b.is_flagged).mean() > 0.999


def test_unknown_rule_is_refused():
    with pytest.raises(UsageError, match="robust, paper"):
        BYE("magic").fit(profile(clean_entropy()))


@pytest.mark.parametrize("rule", RULES)
def test_layers_that_do_not_see_the_picture_are_left_out(rule):
    entropy, bad = poisoned()
    entropy[::3, 1] = np.nan
    result = BYE(rule).fit(profile(entropy)).result_
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
