"""Layers, distances and pruning rules of CleanSight, on arrays."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image

from gazeguard.cli.calibrate import calibrate
from gazeguard.errors import UsageError
from gazeguard.methods.cleansight.auto import CHANGES, changed, most_telling
from gazeguard.methods.cleansight.detector import MIN_FIT, Detector
from gazeguard.methods.cleansight.pruning import above_tau, clean_levels, widest
from gazeguard.methods.cleansight.settings import (
    DEFAULT_SETTING,
    LOOKING,
    PUBLISHED_TAU,
    SETTINGS,
    Setting,
    paper_layers,
    plan,
)
from gazeguard.models.target import ImageTokens
from gazeguard.types import ImagePart, Sample, TextPart, Turn


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (32, (10, 11, 12)),
        (40, (12, 13, 14)),
        (28, (9, 10, 11)),
        (24, (8, 9, 10)),
        (8, (2, 3, 4)),
        (4, (1, 2)),
        (3, (1,)),
        (2, (0,)),
        (1, (0,)),
    ],
)
def test_paper_layers_keep_their_relative_depth(depth, expected):
    assert paper_layers(range(depth)) == expected
    assert depth == 1 or max(expected) < depth - 1, "a later layer must be left to prune in"


def test_paper_layers_count_attention_layers_only():
    """In a hybrid every fourth layer has attention."""
    assert paper_layers(range(3, 128, 4)) == (43, 47, 51)


@pytest.mark.parametrize(
    ("prune", "chosen", "pick", "hide_from", "one_pass"),
    [
        (1.0, (2, 3, 4), (4,), 5, True),
        ("paper", (4, 2), (4,), 5, True),
        (1.0, range(8), (4,), 5, False),
        (1.0, (7,), (4,), 5, False),
        ("widen", (2, 3, 5), (2, 3), 0, False),
        ("widen", range(8), (0, 1, 2, 3, 4), 0, False),
        ("widen", (6, 7), (6, 7), 0, False),
        ("search", range(8), (0, 1, 2, 3, 4), 0, False),
    ],
)
def test_where_tokens_are_picked_and_hidden(prune, chosen, pick, hide_from, one_pass):
    made = plan(Setting("all", "ratio", "whitened", prune), chosen, range(8))
    assert (made.pick, made.hide_from, made.single_pass) == (pick, hide_from, one_pass)
    assert made.layers == tuple(sorted(chosen))
    assert made.watched == {*chosen, *pick}


@pytest.mark.parametrize("chosen", [(), (8,), (-1, 2)])
def test_layers_the_model_lacks_are_refused(chosen):
    with pytest.raises(UsageError, match="choose from"):
        plan(SETTINGS["paper"], chosen, range(8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": "some"},
        {"feature": "entropy"},
        {"distance": "euclid"},
        {"prune": "all"},
        {"prune": 0.0},
        {"prune": -1.0},
    ],
)
def test_settings_refuse_what_they_do_not_know(wrong):
    options = {"layers": "all", "feature": "ratio", "distance": "whitened", "prune": 1.0} | wrong
    with pytest.raises(UsageError):
        Setting(**options)


def test_the_named_settings_are_the_papers_and_ours():
    assert DEFAULT_SETTING in SETTINGS
    assert SETTINGS["paper"] == Setting("paper", "ratio", "whitened", "paper")
    assert PUBLISHED_TAU == {"paper": 1e-4, "balanced": 1e-3, "code": 0.02}


def test_settings_are_documented_and_the_command_line_knows_them():
    page = (Path(__file__).parents[2] / "docs" / "methods" / "cleansight.md").read_text("utf-8")
    for name in (*SETTINGS, *PUBLISHED_TAU, *LOOKING, "auto"):
        assert f"`{name}`" in page or f'"{name}"' in page, name
    assert f"`{DEFAULT_SETTING}` (default)" in page
    option = next(p for p in calibrate.params if p.name == "setting")
    assert isinstance(option.type, click.Choice)
    assert set(option.type.choices) == set(SETTINGS)


def clean(n=400, layers=2, heads=3, seed=0):
    """Correlated log ratios of very different spread, one head constant."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, layers, heads)) * np.array([0.01, 1.0, 100.0])
    x += 5 * rng.normal(size=(n, 1, 1)) * np.array([0.01, 1.0, 100.0])
    x[:, 0, 0] = 2.0
    return x


def test_whitened_is_the_papers_distance():
    x = clean()[:, :, 1:]
    got = Detector.fit(x[:300], "whitened").score(x[300:])
    flat = x.reshape(400, -1)
    mean, std = flat[:300].mean(0), flat[:300].std(0)
    assert np.allclose(got, np.linalg.norm((flat[300:] - mean) / std, axis=1))


def test_ledoit_wolf_is_a_mahalanobis_distance():
    """Against scikit-learn's own, on standardised features."""
    from sklearn.covariance import LedoitWolf

    x = clean()[:, :, 1:].reshape(400, -1)
    z = (x - x[:300].mean(0)) / x[:300].std(0)
    expected = LedoitWolf(assume_centered=True).fit(z[:300]).mahalanobis(z[300:])
    got = Detector.fit(x[:300], "ledoit-wolf").score(x[300:])
    assert np.allclose(got**2, expected)


def test_ledoit_wolf_sees_what_the_whitened_distance_cannot():
    """Heads that always move together, moving apart by less than their spread."""
    x = clean()[:, :, 1:].reshape(400, -1)
    apart = x[300:].copy()
    apart[:, 0] += 2 * x[:, 0].std()
    apart[:, 2] -= 2 * x[:, 2].std()
    for distance, sees in (("whitened", False), ("ledoit-wolf", True)):
        detector = Detector.fit(x[:300], distance)
        limit = np.quantile(detector.score(x[300:]), 0.99)
        assert (np.median(detector.score(apart)) > limit) == sees, distance


@pytest.mark.parametrize("distance", ["whitened", "ledoit-wolf"])
def test_detector_survives_what_clean_data_can_be(distance):
    x = clean()
    detector = Detector.fit(x[:300], distance)
    scores = detector.score(x[300:])
    assert np.isfinite(scores).all(), "a head that never moves"
    wobble = x[300:].copy()
    wobble[:, 0, 0] += 1e-6
    assert np.allclose(detector.score(wobble), scores, rtol=1e-3), "rounding is no alarm"
    broken = x[300:].copy()
    broken[0, 1, 1], broken[1, 0, 2] = np.nan, np.inf
    again = detector.score(broken)
    assert np.isnan(again[:2]).all()
    assert np.array_equal(again[2:], scores[2:]), "one broken input changes no other"
    same = Detector.of(detector.arrays())
    assert np.array_equal(same.score(x), detector.score(x))


def test_detector_refuses_too_little_and_too_uniform_data():
    with pytest.raises(UsageError, match=f"at least {MIN_FIT}"):
        Detector.fit(clean(MIN_FIT - 1), "whitened")
    Detector.fit(clean(MIN_FIT), "ledoit-wolf")
    with pytest.raises(UsageError, match="look alike"):
        Detector.fit(np.ones((50, 2, 3)), "whitened")


def test_above_tau_in_even_shares_and_absolute():
    image = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]], dtype=torch.bool)
    weights = torch.tensor([[0.9, 0.03, 0.01, 0.0004, 0.0], [0.9, 0.5, 0.5, 0.015, 0.06]])
    share = weights * image.sum(1, keepdim=True)
    assert above_tau(share, image, 0.1).tolist() == [
        [False, True, False, False, False],
        [False, False, False, False, True],
    ]
    for name, expected in (
        ("paper", [[1, 2, 3], [3, 4]]),
        ("balanced", [[1, 2], [3, 4]]),
        ("code", [[1], [4]]),
    ):
        got = above_tau(share, image, name)
        assert [row.nonzero().flatten().tolist() for row in got] == expected, name


def test_widest_takes_the_peak_and_its_neighbours():
    image = torch.zeros(3, 14, dtype=torch.bool)
    image[0, 2:14] = True  # a 3 x 4 grid
    image[1, [1, 2, 3, 7, 8]] = True  # two runs, no grid
    excess = torch.zeros(3, 14)
    excess[0, 2 + 3] = 9.0  # top right corner
    excess[0, 0] = 99.0  # not an image token
    excess[1, 8] = 5.0
    images = [(ImageTokens(12, (3, 4)),), (ImageTokens(5),), ()]
    got = widest(excess, image, images, 1)
    assert (got[0].nonzero().flatten() - 2).tolist() == [2, 3, 6, 7]
    assert got[1].nonzero().flatten().tolist() == [7, 8]
    assert not got[2].any(), "no image, no tokens"
    everything = widest(excess, image, images, 100)
    assert torch.equal(everything, image)


def test_widest_stays_within_an_image():
    image = torch.ones(2, 12, dtype=torch.bool)
    excess = torch.zeros(2, 12)
    excess[0, 5], excess[1, 6] = 1.0, 1.0  # the last token of one image, the first of the other
    known = (ImageTokens(6, (2, 3)), ImageTokens(6, (2, 3)))
    got = widest(excess, image, [known, (ImageTokens(6), ImageTokens(6))], 1)
    assert got[0].nonzero().flatten().tolist() == [1, 2, 4, 5]
    assert got[1].nonzero().flatten().tolist() == [6, 7]
    both = widest(excess.sum(0, keepdim=True), image[:1], [known], 2)
    assert both[0].nonzero().flatten().tolist() == [1, 2, 4, 5, 6, 7, 9, 10]


def test_clean_levels_are_a_quantile_of_the_strongest_token():
    strongest = np.arange(100, dtype=np.float32)[:, None, None] * np.ones((1, 2, 3))
    assert np.allclose(clean_levels(strongest), np.quantile(np.arange(100), 0.9))
    assert (clean_levels(np.zeros((10, 2, 3))) > 0).all(), "levels are divided by"


def test_most_telling_layers_have_content_and_little_noise():
    rng = np.random.default_rng(0)
    content = np.array([1.0, 1.0, 3.0, 3.0, 3.0, 3.0])[:, None]
    noise = np.array([0.1, 0.1, 0.1, 0.2, 0.1, 3.0])[:, None]
    x = content * rng.normal(size=(200, 6, 4))
    copies = x + noise * rng.normal(size=(3, 200, 6, 4))
    assert most_telling(x, copies, (0, 1, 2, 3, 4, 5)) == (2, 3, 4)
    assert most_telling(x[:, :2], copies[:, :, :2], (5, 9)) == (5, 9)


def test_harmless_changes_paste_nothing_in():
    ramp = np.broadcast_to(np.linspace(0, 200, 64)[None, :, None], (64, 64, 3))
    ramp = (ramp + 20 * (np.indices((64, 64)).sum(0) % 2)[..., None]).astype(np.uint8)
    turns = (Turn("user", (ImagePart(0), TextPart("what?"))),)
    samples = [Sample(i, f"id{i}", (Image.fromarray(ramp),), turns) for i in range(2)]
    made = changed(samples, 0)
    assert len(made) == len(CHANGES) * 2
    assert len({s.sample_id for s in made}) == len(made)
    for sample in made:
        pixels = np.asarray(sample.images[0])
        assert pixels.shape == ramp.shape
        assert pixels.dtype == np.uint8
        assert (pixels != ramp).any()
        # Brightness moves by a fifth at most; what is left over is noise.
        scale = pixels.mean() / ramp.mean()
        assert 0.75 < scale < 1.25
        assert np.abs(pixels / scale - ramp).max() < 50
    again = changed(samples, 0)
    assert all(
        (np.asarray(a.images[0]) == np.asarray(b.images[0])).all()
        for a, b in zip(made, again, strict=True)
    )
