"""Data-level defences of the benchmark: known answers on made-up profiles and activations."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from sklearn.cluster import KMeans
from sklearn.decomposition import FastICA
from sklearn.metrics import silhouette_score

from gazeguard.bench.defences import DEFENCES, cleaning
from gazeguard.bench.defences.activations import last_states
from gazeguard.bench.defences.bye import as_paper_tokens
from gazeguard.bench.defences.cleaning import (
    DIMENSIONS,
    most_frequent_answer,
    smaller_cluster,
    spectral_outliers,
)
from gazeguard.bench.subject import Tuned, Upload
from gazeguard.errors import MeasurementError
from gazeguard.lab import tiny
from gazeguard.lab.poison import TARGET, make_set, samples
from gazeguard.lab.rows import Row
from gazeguard.models.load import load
from gazeguard.types import Profile

N, BAD = 1000, 100
DATA = sorted(name for name, one in DEFENCES.items() if one.level == "data")
PAPER_FORMS = sorted(name for name in DATA if name.startswith("bye-"))


def upload(profile=None, seed=0, n=N, **cached):
    """An upload that was measured already; its rows do not matter."""
    row = Row(np.zeros((1, 1, 3), np.uint8), "Describe the image.", "red", "unknown")
    made = Upload(Tuned(Path(), Path(), seed), [row] * n, Path())
    if profile is not None:
        made.cleaned = SimpleNamespace(profile=profile)
    for name, value in cached.items():
        setattr(made, name, value)
    return made


def profile(entropy, tokens=576):
    n = len(entropy)
    return Profile(
        row=np.arange(n),
        turn=np.ones(n, np.int64),
        sample_id=[str(i) for i in range(n)],
        prompt=["Describe the image."] * n,
        answer=["red"] * n,
        image_tokens=np.broadcast_to(tokens, n).copy(),
        layers=tuple(range(entropy.shape[1])),
        signals={"entropy": entropy.astype(np.float32)},
    )


def entropies(gap, layers=(2, 3), share=BAD / N, seed=0):
    """`(N, 6)` around 5 nats with a spread of 0.1, and which rows lie `gap` spreads lower."""
    found = 5 + 0.1 * np.random.default_rng(seed).normal(size=(N, 6))
    bad = np.arange(N) < share * N
    found[np.ix_(bad, layers)] -= 0.1 * gap
    return found, bad


def run(name, *args, **kwargs):
    return DEFENCES[name].run(upload(*args, **kwargs))


@pytest.mark.parametrize("name", PAPER_FORMS)
def test_paper_forms_find_a_plain_group(name):
    entropy, bad = entropies(10, layers=range(6))
    assert (run(name, profile(entropy)) == bad).mean() > 0.995


@pytest.mark.parametrize("name", PAPER_FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_paper_forms_leave_one_group_alone(name, seed):
    entropy, _ = entropies(0, seed=seed)
    assert not run(name, profile(entropy)).any()


def test_selecting_layers_is_what_the_ablation_drops():
    entropy, bad = entropies(4, layers=(2,))
    entropy[:, :2] += np.random.default_rng(1).normal(size=(N, 1))
    assert (run("bye-paper", profile(entropy)) == bad).mean() > 0.95
    assert not run("bye-all-layers", profile(entropy)).any()
    assert not run("bye-bsi-0", profile(entropy)).any()


def test_separation_is_the_only_difference_of_the_sweep():
    entropy, bad = entropies(2.5, layers=range(6), share=0.3)
    entropy[:] = entropy[:, :1]  # no gain from averaging
    wide = profile(entropy)
    assert (run("bye-bsi-1", wide) == bad).mean() > 0.85
    assert not run("bye-paper", wide).any()
    entropy[bad] -= 0.1
    middling = profile(entropy)
    assert (run("bye-paper", middling) == bad).mean() > 0.9
    assert not run("bye-bsi-3", middling).any()


def test_only_the_unguarded_form_removes_a_majority():
    entropy, low = entropies(10, share=0.7)
    assert not run("bye-paper", profile(entropy)).any()
    assert (run("bye-unguarded", profile(entropy)) == low).all()


def test_the_fixed_threshold_is_a_share_of_even_attention():
    tokens = np.where(np.arange(N) % 2, 16, 300)
    even = np.repeat(np.log(tokens)[:, None], 6, 1)
    assert as_paper_tokens(profile(even, tokens)).entropy == pytest.approx(np.log(576), rel=1e-6)
    share = np.where(np.arange(N) < BAD, 0.70, 0.72)  # 4.5 of ln 576 is 0.708
    found = run("bye-threshold", profile(even * share[:, None], tokens))
    assert (found == (np.arange(N) < BAD)).all()
    assert not run("bye-threshold", profile(even[:, :1] * 0.72, tokens)).any()
    single = as_paper_tokens(profile(np.zeros((N, 6)), 1))
    assert np.isfinite(single.entropy).all(), "one image token has no entropy to compare with"


@pytest.mark.parametrize("name", PAPER_FORMS)
def test_too_few_rows_lose_nothing(name):
    entropy, _ = entropies(10, layers=range(6))
    few = run(name, profile(entropy[60:105]), n=45)
    assert few.shape == (45,)
    assert not few.any()


def test_what_could_not_be_measured_stays():
    entropy, bad = entropies(10)
    measured = replace(profile(entropy), row=np.arange(N) + 7)
    found = run("bye-paper", measured, n=N + 7)
    assert found[:7].sum() == 0
    assert (found[7:] == bad).mean() > 0.995


def test_clean_is_what_clean_decided():
    report = SimpleNamespace(
        rows=np.array([0, 2, 3]), result=SimpleNamespace(is_flagged=np.array([False, True, False]))
    )
    found = run("clean", n=4, cleaned=SimpleNamespace(report=report))
    assert found.tolist() == [False, False, True, False]


def test_random_drop_is_a_fifth_by_seed():
    one, again, other = (run("random-drop", seed=seed) for seed in (3, 3, 4))
    assert one.sum() == other.sum() == N // 5
    assert (one == again).all()
    assert (one & other).mean() == pytest.approx(0.04, abs=0.02), "independent draws"
    assert not run("none").any()


@pytest.mark.parametrize("task", ["captions", "easy-vqa"])
def test_answer_baseline(task):
    rows = make_set(task, 120, "badnet-center", 0.1, seed=0)
    flagged = most_frequent_answer(rows)
    assert [r.is_poison for r in rows] == flagged.tolist()
    assert all(r.answer == TARGET for r, f in zip(rows, flagged, strict=True) if f)


def test_answer_baseline_needs_two_words():
    assert not run("answers").any(), "every answer is the word 'red'"


def states(away=8.0, bad=BAD, seed=0):
    """`(N, 24)` of very unequal spread, the first `bad` rows apart along one direction."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(N, 24)) * np.geomspace(3, 0.1, 24)
    found[:bad, 1] += 3 * away
    return (found + 5).astype(np.float32), np.arange(N) < bad


def test_spectral_removes_what_reaches_furthest_and_always_15_percent():
    activations, bad = states()
    found = run("spectral", activations=activations)
    assert found.sum() == 150
    assert found[bad].all()
    clean, _ = states(bad=0)
    assert run("spectral", activations=clean).sum() == 150
    assert spectral_outliers(activations, 0.02).sum() == 30
    assert spectral_outliers(activations[:1], 0.1).sum() == 0


def test_activation_clustering_finds_the_smaller_group():
    activations, bad = states()
    assert (run("activation-clustering", activations=activations) == bad).mean() > 0.99


@pytest.mark.parametrize("seed", range(3))
def test_activation_clustering_leaves_one_cloud_alone(seed):
    clean, _ = states(bad=0, seed=seed)
    assert not smaller_cluster(clean, seed).any()


def test_each_guard_of_activation_clustering_decides(monkeypatch):
    """Halves are no minority; a weak group is one, but does not hold together."""
    even, _ = states(bad=N // 2)
    weak, _ = states(away=3.25, bad=300)
    assert not smaller_cluster(even, 0).any()
    assert not smaller_cluster(weak, 0).any()
    monkeypatch.setattr(cleaning, "COHESIVE", -1.0)
    assert not smaller_cluster(even, 0).any()
    assert smaller_cluster(weak, 0).any()
    monkeypatch.setattr(cleaning, "MINORITY", 0.6)
    assert smaller_cluster(even, 0).any()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_independent_components_would_change_nothing():
    activations, _ = states()
    # Of mostly Gaussian directions there are no best ones to converge to, but all are rotations.
    reduced = FastICA(DIMENSIONS, whiten="unit-variance", random_state=0, max_iter=20)
    by_ica = reduced.fit_transform(activations)
    label = KMeans(2, n_init=10, random_state=0).fit_predict(by_ica)
    assert silhouette_score(by_ica, label) > 0.1
    assert (smaller_cluster(activations, 0) == (label == np.bincount(label).argmin())).all()


@pytest.mark.parametrize(
    "few",
    [np.ones((1, 4)), np.eye(2, 4), np.ones((50, 4))],
    ids=["one row", "two rows", "all the same"],
)
def test_activation_clustering_without_two_clusters(few):
    assert not smaller_cluster(few.astype(np.float32), 0).any()


def test_activation_clustering_does_not_blow_up_rounding():
    rng, bad = np.random.default_rng(0), np.arange(N) < 30
    along = rng.normal(size=(N, 1)) + 10 * bad[:, None]
    line = (along * rng.normal(size=24) + 5).astype(np.float32)
    assert smaller_cluster(line, 0).tolist() == bad.tolist()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Tuned:
    """A tiny random LLaVA with a random adapter."""
    base = tiny.build("llava", tmp_path_factory.mktemp("models") / "llava")
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(base)
    modules = r".*language_model.*\.(q|v)_proj"
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    adapter = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, config).save_pretrained(adapter)
    return Tuned(base, adapter, 0)


@pytest.fixture(scope="module")
def small(tuned, tmp_path_factory) -> Upload:
    rows = make_set("mixed", 60, "badnet-center", 0.1, 0)
    return Upload(tuned, rows, tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("name", DATA)
def test_contract(small, name):
    assert not any(row.is_poison for row in small.rows)
    found, again = (DEFENCES[name].run(small) for _ in range(2))
    assert found.shape == (60,)
    assert found.dtype == bool
    assert (found == again).all()


def test_last_states_are_what_the_language_head_reads(tuned, small):
    asked = small.samples[:6]
    assert len({len(sample.prompt) for sample in asked}) > 1, "some prompts are padded"
    found = last_states(tuned.target, asked, 4)
    for sample, state in zip(asked, found, strict=True):
        inputs = tuned.target.encode([sample]).inputs
        with torch.inference_mode():
            every = tuned.target.model(**inputs, output_hidden_states=True).hidden_states
        assert state == pytest.approx(every[-1][0, -1].numpy(), abs=1e-5)
    with tuned.target.without_adapter():
        assert abs(last_states(tuned.target, asked, 4) - found).max() > 1e-2
    assert small.activations is small.activations, "computed once"
    assert small.activations[:6] == pytest.approx(found, abs=1e-5)


def test_broken_weights_are_named(tuned):
    broken = load(tuned.base, dtype="float32")
    with torch.no_grad():
        broken.base.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(MeasurementError, match="not finite"):
        last_states(broken, samples(make_set("captions", 2, "none", 0, 0)), 2)
