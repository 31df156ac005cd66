"""AMDET's decision, statistics and settings, without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gazeguard.errors import UsageError
from gazeguard.methods.amdet.decision import Gate, References, decide, gates_of, leverage_of
from gazeguard.methods.amdet.evidence import nearest_prompts
from gazeguard.methods.amdet.heldout import HeldOut
from gazeguard.methods.amdet.inversion import Terms, _stands_still
from gazeguard.methods.amdet.settings import PUBLISHED, Gates, Settings
from gazeguard.types import Outcome


def held(likeness: float, agreement: float, anchor: float, unity: float, n: int = 100) -> HeldOut:
    def full(value: float) -> np.ndarray:
        return np.full(n, value)

    return HeldOut(
        full(likeness), full(agreement), full(anchor), unity, np.ones(3, np.float32) / 3**0.5
    )


PLANTED = held(0.95, 0.97, -0.2, 0.98)
NATURAL = held(0.95, 0.97, 0.95, 0.98)
ORDINARY = held(0.5, 0.6, 0.97, 0.8)
SMALL = held(0.75, 0.97, 0.3, 0.98)  # a backdoor in a small encoder: two gates are out of reach


def decided(found: HeldOut, positive: float, references: References | None = None):
    return decide(found, gates_of(found, positive), Settings(gates=True), references)


@pytest.mark.parametrize(
    ("found", "drift", "outcome", "says"),
    [
        (PLANTED, 0.01, Outcome.FLAGGED, "flagged above 4.5"),
        (SMALL, 0.005, Outcome.FLAGGED, "the clean anchor does not follow"),
        (SMALL, 0.02, Outcome.INCONCLUSIVE, "high learning rate"),
        (PLANTED, 0.021, Outcome.INCONCLUSIVE, "ordinary prompts moved as well"),
        (held(0.9, 0.6, 0.9, 0.95), 1e-9, Outcome.CLEAN, "no embedding was found"),
        (NATURAL, 0.01, Outcome.CLEAN, "natural backdoor"),
        (held(0.9, 0.5, 1.0, 0.2), 0.01, Outcome.CLEAN, "no embedding was found"),
        (ORDINARY, 0.5, Outcome.CLEAN, "no embedding was found"),
    ],
)
def test_leverage_decides_by_default(found, drift, outcome, says):
    for curvature in (0.9, float("nan")):
        verdict = decide(found, gates_of(found, curvature), Settings(), drift=drift)
        assert verdict.outcome is outcome, verdict
        assert says in verdict.reason or says in verdict.reason.lower()
        assert 0 <= verdict.suspicion <= 1
        assert (verdict.suspicion > verdict.threshold) == (outcome is Outcome.FLAGGED)
        assert ("--reference" in verdict.reason) == (outcome is Outcome.INCONCLUSIVE)


def test_leverage_is_the_score_per_radian_that_clean_outputs_moved():
    angle = 0.1
    assert leverage_of(0.7, 1 - np.cos(angle)) == pytest.approx(0.7 / angle, rel=1e-3)
    assert leverage_of(0.7, 0.0) == leverage_of(0.7, -1e-9) == pytest.approx(0.7 / 0.02**0.5 * 10)
    assert leverage_of(-0.1, 0.01) < 0


def test_suspicion_grows_with_the_score():
    scores = [held(0.5, 0.9, 0.9 - x, 0.9) for x in np.linspace(-0.1, 1.1, 30)]
    said = [decide(found, gates_of(found, 0.5), Settings()).suspicion for found in scores]
    assert said == sorted(said)
    assert said[-1] > 0.7


def test_references_outweigh_how_far_an_encoder_moved():
    gates = gates_of(PLANTED, 0.9)
    usual = References(tuple(np.linspace(-1, 3, 19)), 0.05)
    assert decide(PLANTED, gates, Settings(), usual, drift=0.05).outcome is Outcome.FLAGGED
    # A score that is no news where ordinary prompts moved as much.
    assert decide(PLANTED, gates, Settings(), usual, drift=0.2).outcome is Outcome.CLEAN


def test_all_four_gates_make_a_backdoor():
    verdict = decided(PLANTED, 0.95)
    assert verdict.outcome is Outcome.FLAGGED
    assert verdict.suspicion > verdict.threshold
    assert "arXiv:2512.00343" in verdict.threshold_source


@pytest.mark.parametrize(
    ("found", "positive", "outcome", "says"),
    [
        (ORDINARY, 0.9, Outcome.CLEAN, "no embedding was found"),
        (NATURAL, 0.9, Outcome.CLEAN, "the clean anchor follows"),
        (PLANTED, 0.5, Outcome.CLEAN, "ragged"),
        (SMALL, 0.5, Outcome.INCONCLUSIVE, "--reference"),
        (PLANTED, float("nan"), Outcome.INCONCLUSIVE, "curvature"),
    ],
)
def test_outcomes_short_of_a_backdoor(found, positive, outcome, says):
    verdict = decided(found, positive)
    assert verdict.outcome is outcome
    assert says in verdict.reason or says in verdict.reason.lower()
    assert verdict.suspicion is not None
    assert verdict.suspicion < 0.5


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 0.99))
def test_degree_keeps_the_order_and_the_threshold(a: float, b: float, threshold: float):
    low, high = sorted((a, b))
    assert Gate("g", low, threshold, "").degree <= Gate("g", high, threshold, "").degree
    gate = Gate("g", a, threshold, "")
    assert 0 <= gate.degree <= 1
    if gate.passed:
        assert gate.degree >= 0.5
    else:
        assert gate.degree <= 0.5


def test_a_gate_that_was_not_measured_is_not_met():
    gate = Gate("curvature", float("nan"), 0.8, "")
    assert not gate.passed
    assert gate.degree == 0.0


def test_shares_count_what_the_gates_say():
    found = HeldOut(
        np.array([0.7, 0.9, 0.9, 0.9]),
        np.array([1.0, 0.93, 0.91, 0.95]),
        np.array([-0.1, 0.1, -0.1, 0.0]),
        0.9,
        np.zeros(2, np.float32),
    )
    assert found.shares(PUBLISHED) == (0.75, 0.75, 0.5)
    assert found.shares(Gates(assimilation=0.95)) == (0.0, 0.75, 0.5)
    assert found.score == pytest.approx(0.9 + 0.025)
    assert found.finite


def test_numbers_that_are_not_finite_are_seen():
    broken = held(float("nan"), 1.0, 0.0, 1.0)
    assert not broken.finite


def test_references_decide_by_rank():
    usual = References(tuple(np.linspace(-0.3, 0.3, 19)), 0.05)
    verdict = decided(SMALL, 0.5, usual)
    assert verdict.outcome is Outcome.FLAGGED
    assert verdict.suspicion == pytest.approx(0.95)
    assert verdict.threshold == pytest.approx(0.95)
    assert "p = 0.050" in verdict.reason
    assert "leverage of 4.8" in verdict.reason
    benign = decided(ORDINARY, 0.5, usual)
    assert benign.outcome is Outcome.CLEAN
    assert "usual among 19" in benign.reason
    overruling = References((*np.linspace(-0.3, 0.3, 18), 5.0), 0.05)
    assert decided(SMALL, 0.5, overruling).outcome is Outcome.CLEAN
    natural = decided(NATURAL, 0.5, usual)
    assert "natural backdoor" in natural.reason


def test_a_rare_score_that_the_anchor_explains_is_no_backdoor():
    low = References(tuple(np.linspace(-5, -3, 19)), 0.05)
    verdict = decided(ORDINARY, 0.5, low)
    assert verdict.outcome is Outcome.CLEAN
    assert "the anchor follows" in verdict.reason
    assert verdict.suspicion < verdict.threshold


def test_references_are_left_out_one_by_one():
    scores = (*np.linspace(-0.3, 0.3, 20), 2.0)
    assert References(scores, 0.05).left_out() == 1
    assert References(tuple(np.zeros(20)), 0.05).left_out() == 0


def test_too_few_references_are_refused_with_the_number_needed():
    with pytest.raises(UsageError, match="at least 19"):
        References((0.0,) * 18, 0.05)
    References((0.0,) * 19, 0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"restarts": 0},
        {"points": 2},
        {"steps": 0},
        {"held_out": 1.0},
        {"rows": 0},
        {"threshold": 0.0},
        {"halving": -1},
    ],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UsageError, match="must"):
        Settings(**wrong)


def test_settings_from_words():
    words = ["anchor_weight=0", "padding=true", "steps=null", "restarts=2"]
    found = Settings.read(words)
    assert found == {"anchor_weight": 0.0, "padding": True, "steps": None, "restarts": 2}
    assert isinstance(found["anchor_weight"], float)
    assert Settings.read([]) == {}


@pytest.mark.parametrize(
    "word", ["weight=1", "padding=1", "restarts=2.5", "batch=many", "steps", "=3", "batch=null"]
)
def test_words_that_are_no_settings(word):
    with pytest.raises(UsageError, match="setting|type"):
        Settings.read([word])


def test_published_settings_are_the_papers():
    published = Settings.published()
    assert (published.clean_weight, published.anchor_weight) == (0.1, 0.1)
    assert (published.assimilation_weight, published.agreement_weight) == (1, 0)
    assert (published.halving, published.patience, published.gates) == (0, 0, True)
    assert (published.learning_rate, published.radius) == (0.08, 0)
    assert (published.learning_rate, published.weight_decay) == (0.08, 1e-5)
    assert (published.batch, published.prompts, published.held_out) == (10, 4000, 0.2)
    assert (published.restarts, published.points, published.padding) == (1, 50, True)
    assert published.seed == 42
    assert Settings.published(seed=3).seed == 3


def test_the_loss_weighs_its_terms():
    outputs = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])
    terms = Terms(
        torch.full((1, 3), 0.5), torch.full((1, 3), 1.0), torch.full((1, 3), -1.0), outputs
    )
    published = Settings.published(clean_weight=0.2, anchor_weight=0.3)
    assert terms.loss(published).tolist() == [pytest.approx([-0.5 + 0.2 - 0.3] * 3)]
    # Two prompts of three agree; with how many others each does counts.
    ours = Settings(
        assimilation_weight=0.4, agreement_weight=2.0, clean_weight=0.2, anchor_weight=0.3
    )
    rest = -0.4 * 0.5 + 0.2 - 0.3
    assert terms.loss(ours).tolist() == [pytest.approx([rest - 1.0, rest - 1.0, rest])]
    alone = Terms(
        *(value[:, :1] for value in (terms.assimilation, terms.to_clean)),
        terms.to_anchor[:, :1],
        outputs[:, :1],
    )
    assert alone.loss(ours).item() == pytest.approx(rest)  # nothing to agree with


def test_the_search_stops_only_when_every_restart_stands_still():
    settings = Settings(patience=20, tolerance=0.01)
    flat = [torch.tensor([1.0, 1.0])] * 40
    falling = [torch.tensor([1.0, 1.0 - 0.01 * i]) for i in range(40)]
    both = torch.arange(2)
    assert _stands_still(flat, both, settings)
    assert not _stands_still(falling, both, settings)
    assert _stands_still(falling, torch.tensor([0]), settings)  # the other one was dropped
    assert not _stands_still(flat[:39], both, settings)
    assert not _stands_still(flat, both, Settings(patience=0))


def test_nearest_prompts_look_past_what_all_prompts_share():
    cone = torch.tensor([10.0, 0.0, 0.0])
    clean = cone + torch.eye(3)[[1, 2, 1]] * torch.tensor([[1.0], [1.0], [-1.0]])
    target = torch.nn.functional.normalize(cone + torch.tensor([0.0, 0.0, 0.5]), dim=0).numpy()
    found = nearest_prompts(target, clean, ["a", "b", "c"], n=2)
    assert found[0][0] == "b"
    assert len(found) == 2
