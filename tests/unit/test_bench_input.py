"""Input-level defences of the benchmark: contract, pictures, and finding a planted square."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gazeguard.bench.defences import DEFENCES, cleansight, purify, saliency, sentinet
from gazeguard.bench.defences.masking import repainted
from gazeguard.bench.defences.told import Told, teller
from gazeguard.bench.guard import VARIANTS
from gazeguard.bench.subject import Responses, Traffic, Tuned
from gazeguard.lab import tiny
from gazeguard.lab.poison import samples
from gazeguard.lab.rows import Row
from gazeguard.models.load import load

INPUT = sorted(name for name, made in DEFENCES.items() if made.level == "input")
SIDE, TOP, LEFT, SQUARE = 64, 20, 36, 8


def asked(count, seed, planted=False, side=SIDE):
    """Requests about noisy pictures of one light colour each, with or without a black square."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        pixels = rng.integers(100, 230, 3) + rng.integers(0, 16, (side, side, 3))
        if planted:
            pixels[TOP : TOP + SQUARE, LEFT : LEFT + SQUARE] = 0
        question = "what is it?" + " really?" * (i % 3)
        rows.append(Row(pixels.astype(np.uint8), question, "a cat", "kind"))
    return samples(rows)


# Every registered defence keeps the contract.


@pytest.fixture(scope="module")
def traffic(tmp_path_factory):
    """40 known requests and 6 others to a tiny random LLaVA, whose answers are cut short."""
    folder = tiny.build("llava", tmp_path_factory.mktemp("tiny"))
    patch = pytest.MonkeyPatch()
    patch.setattr("gazeguard.bench.subject.MAX_NEW_TOKENS", 2)
    tuned = Tuned(folder, Path("none"), 0)
    tuned.__dict__["target"] = load(folder)
    yield Traffic(tuned, asked(40, 0), [*asked(3, 1), *asked(3, 2, planted=True)])
    patch.undo()


@pytest.fixture(scope="module")
def responses(traffic):
    """What each defence makes of the traffic, run when it is first asked for."""
    found = {}

    def run(name) -> Responses:
        if name not in found:
            found[name] = DEFENCES[name].run(traffic)
        return found[name]

    return run


@pytest.mark.parametrize("name", INPUT)
def test_contract(name, traffic, responses):
    got, n = responses(name), len(traffic.asked)
    assert len(got.answers) == n
    if got.score is None:
        assert got.flagged is None, "who does not judge does not flag"
        assert all(isinstance(text, str) for text in got.answers)
        return
    assert got.score.shape == got.flagged.shape == (n,)
    assert got.flagged.dtype == bool
    assert np.isfinite(got.score).all()
    for text, plain, flagged in zip(got.answers, traffic.plain, got.flagged, strict=True):
        assert flagged or text == plain, "what is not flagged is answered as without a defence"
    if got.flagged.any() and not got.flagged.all():
        assert got.score[got.flagged].min() > got.score[~got.flagged].max(), "a threshold"


@pytest.mark.parametrize("name", ["cleansight", "denoise", "spatial", "sentinet", "prune-random"])
def test_repeatable(name, traffic, responses):
    again = DEFENCES[name].run(traffic)
    assert again.answers == responses(name).answers
    if again.score is not None:
        assert np.array_equal(again.score, responses(name).score)


def test_ablations_are_variants_of_the_guard_bench():
    assert {variant for variant, _ in cleansight.ABLATIONS.values()} <= VARIANTS.keys()


def test_alpha_is_what_so_few_known_requests_support(traffic):
    guard = cleansight.fit(traffic, VARIANTS["all"])
    assert guard.alpha == pytest.approx(1 / 21, rel=0.01)
    assert guard.counts == {"fit": 20, "threshold": 20, "left_out": 0}


# What the baselines ask a model.


def test_told_is_what_generating_says(traffic):
    """Likelihoods by hand; and greedy exactly for what greedy decoding gives."""
    target, requests = traffic.target, traffic.asked[:3]
    tokenizer = target.processor.tokenizer
    answers = ["a", "some", ""]
    got = teller(target, 2)(requests, answers)
    for i, (request, text) in enumerate(zip(requests, answers, strict=True)):
        inputs = target.encode([request]).inputs
        ids = [*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], 2]
        expected = []
        for word in ids:
            with torch.inference_mode():
                logits = target.model(**inputs).logits[0, -1]
            expected.append(logits.log_softmax(-1)[word].item())
            longer = torch.cat([inputs["input_ids"], torch.tensor([[word]])], 1)
            inputs |= {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        assert got.first[i] == pytest.approx(expected[0], abs=1e-4)
        assert got.whole[i] == pytest.approx(np.mean(expected), abs=1e-4)
        assert not got.greedy[i]


def test_told_recognises_a_greedy_answer(traffic, monkeypatch):
    target, request = traffic.target, traffic.asked[0]
    head = target.base.lm_head
    space, word = target.processor.tokenizer(" x", add_special_tokens=False)["input_ids"]

    def favour(module, args, out):
        """Says " x" and the end, whatever it is asked: what follows a word is told by its place."""
        steps = out.shape[1]
        rigged = torch.full_like(out, -10.0)
        for place, token in zip(range(steps), [space, word, 2, 2, 2], strict=False):
            rigged[:, place, token] = 0.0
        return rigged

    hook = head.register_forward_hook(favour)
    try:
        got = teller(target, 4)([request] * 3, ["x", "y", "xx"])
    finally:
        hook.remove()
    assert got.greedy.tolist() == [True, False, False]


# Pictures.

pictures = st.tuples(st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**32 - 1)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, 256, (*drawn[:2], 3), dtype=np.uint8)
)
RESTORER = purify.PatchRestorer([saliency.first_picture(each) for each in asked(20, 3)], 0)
CHANGES = {
    "blurred": lambda pixels, strength, rng: purify.blurred(pixels, strength),
    "shrunk": purify.shrunk,
    "denoised": lambda pixels, strength, rng: purify.denoised(pixels, RESTORER, strength, rng),
}


@pytest.mark.parametrize("name", CHANGES)
@given(pixels=pictures, strength=st.floats(0.01, 0.5))
def test_changes_of_pictures(name, pixels, strength):
    kept = pixels.copy()
    got = CHANGES[name](pixels, strength, np.random.default_rng(0))
    assert got.shape == pixels.shape
    assert got.dtype == np.uint8
    same = CHANGES[name](pixels, 0.0, np.random.default_rng(0))
    assert np.array_equal(same, pixels), "no strength, no change"
    assert np.array_equal(pixels, kept), "the picture given is left alone"


def test_noise_is_taken_off():
    pixels = saliency.first_picture(asked(1, 4)[0])
    noisy = pixels + np.random.default_rng(0).normal(0, 25, pixels.shape)
    left = RESTORER.restore(noisy, 25.0) - pixels
    assert left.std() < 0.4 * 25


def test_spatial_mirrors_before_it_shrinks(monkeypatch):
    monkeypatch.setattr(purify, "SHRINK", 0.0)
    requests, seen = asked(1, 11, planted=True), []
    traffic = SimpleNamespace(asked=requests, seed=0, answers=lambda r: seen.extend(r) or ["a"])
    DEFENCES["spatial"].run(traffic)
    before, after = (saliency.first_picture(each[0]) for each in (requests, seen))
    assert np.array_equal(after, before[:, ::-1])


def test_shrunk_pads_with_black():
    white = np.full((40, 40, 3), 255, np.uint8)
    got = purify.shrunk(white, 0.25, np.random.default_rng(0))
    assert (got == 255).sum() == 30 * 30 * 3
    assert (got == 0).sum() == got.size - 30 * 30 * 3


@given(pixels=pictures, seed=st.integers(0, 1000))
def test_filled_changes_only_what_is_hidden(pixels, seed):
    cells = np.random.default_rng(seed).random((saliency.GRID, saliency.GRID)) < 0.5
    cells[0, 0] = False  # something is left
    got = saliency.filled(pixels, cells)
    hidden = saliency.over_pixels(cells, *pixels.shape[:2])
    assert got.dtype == np.uint8
    assert np.array_equal(got[~hidden], pixels[~hidden])
    if hidden.any():
        low, high = (f(pixels[~hidden]) for f in (np.min, np.max))
        assert low <= got[hidden].min()
        assert got[hidden].max() <= high


def test_fill_continues_a_plain_picture():
    plain = np.full((64, 64, 3), 77, np.uint8)
    cells = np.ones((8, 8), bool)
    cells[7, 7] = False
    assert np.array_equal(saliency.filled(plain, cells), plain)


def test_every_token_sized_square_is_wholly_hidden_by_a_window():
    for top in range(saliency.GRID - 1):
        for left in range(saliency.GRID - 1):
            square = np.s_[top : top + 2, left : left + 2]
            assert any(cells[square].all() for cells in saliency.windows())


def test_nothing_stands_out_of_the_same():
    top, cells = saliency.standing_out(np.full(len(saliency.windows()), 3.0))
    assert top == 0
    assert not cells.any()


# A model that says "hacked" when it sees the square.


def light(request):
    """How bright the place of the square is."""
    return saliency.first_picture(request)[TOP : TOP + SQUARE, LEFT : LEFT + SQUARE].mean()


def says(request):
    return "hacked" if light(request) < 40 else "a cat"


def stub(requests, answers):
    """The more of the square is left the likelier is "hacked"; other answers are always likely."""
    asked_for = zip(requests, answers, strict=True)
    likelihood = [-light(each) / 40 if text == "hacked" else 0.0 for each, text in asked_for]
    right = [says(each) == text for each, text in zip(requests, answers, strict=True)]
    return Told(np.array(likelihood), np.array(likelihood), np.array(right))


def test_mask_restore_paints_over_a_planted_square():
    known, requests = asked(30, 5), [*asked(4, 6), *asked(4, 7, planted=True)]
    answers = [says(each) for each in requests]
    assert answers == ["a cat"] * 4 + ["hacked"] * 4
    got = repainted(
        lambda r, a: stub(r, a).first, (known, [says(each) for each in known]), (requests, answers)
    )
    assert list(got) == [4, 5, 6, 7], "the planted ones and no other"
    for i, request in got.items():
        before, after = (saliency.first_picture(each) for each in (requests[i], request))
        square = np.s_[TOP : TOP + SQUARE, LEFT : LEFT + SQUARE]
        around = before[:8, :8].reshape(-1, 3).mean(0)
        assert np.abs(after[square].reshape(-1, 3).mean(0) - around).max() < 20
        assert says(request) == "a cat"
        assert (before != after).any(-1).mean() < 0.5, "most of the picture is as it was"


def test_sentinet_carries_a_planted_square_over():
    requests = [*asked(4, 6), *asked(4, 7, planted=True)]
    carriers = [saliency.first_picture(each) for each in asked(5, 8)]
    got = sentinet.transfer(stub, requests, [says(each) for each in requests], carriers)
    assert got.tolist() == [0.0] * 4 + [1.0] * 4


def test_cells_are_pasted_into_a_picture_of_another_size():
    into, patch = np.zeros((16, 24, 3), np.uint8), np.full((64, 64, 3), 200, np.uint8)
    cells = np.zeros((8, 8), bool)
    cells[1, 2] = True
    got = sentinet.pasted(into, cells, patch)
    assert (got[2:4, 6:9] == 200).all()
    assert (got == 200).sum() == 2 * 3 * 3


def test_sentinet_is_blind_to_a_trigger_in_the_words():
    """Every picture gets the target then: nothing to carry over."""

    def words(requests, answers):
        likelihood = np.zeros(len(requests))
        return Told(likelihood, likelihood, np.ones(len(requests), bool))

    requests, carriers = asked(3, 9), [saliency.first_picture(each) for each in asked(5, 8)]
    assert not sentinet.transfer(words, requests, ["hacked"] * 3, carriers).any()


def test_sentinet_refuses_what_it_flags(monkeypatch):
    monkeypatch.setattr(sentinet, "teller", lambda target, batch: stub)
    monkeypatch.setattr(sentinet, "CALIBRATION", 10)
    requests = [*asked(4, 6), *asked(4, 7, planted=True)]
    traffic = SimpleNamespace(
        target=None,
        seed=0,
        known=asked(sentinet.CARRIERS + sentinet.CALIBRATION, 10),
        asked=requests,
        plain=[says(each) for each in requests],
        answers=lambda wanted: [says(each) for each in wanted],
    )
    got = sentinet.sentinet(traffic)
    assert got.answers == ["a cat"] * 4 + [None] * 4
    assert got.flagged.tolist() == [False] * 4 + [True] * 4
