"""The search itself, on tiny random encoders: batches, memory of nothing, and runaway restarts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gazeguard.data.grammar import prompts as grammar
from gazeguard.errors import MeasurementError, ModelError
from gazeguard.lab import tiny_encoders
from gazeguard.methods.amdet import Settings, scan_encoder
from gazeguard.methods.amdet.heldout import held_out
from gazeguard.methods.amdet.inversion import _batches, apply, clean_outputs, invert
from gazeguard.methods.amdet.surface import surface
from gazeguard.models.encoders.encoder import TextEncoder
from gazeguard.models.encoders.load import load_encoder

QUICK = Settings(prompts=120, steps=6, restarts=3, points=5, rows=50)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TextEncoder]:
    root, found = tmp_path_factory.mktemp("search"), {}

    def load(kind: str) -> TextEncoder:
        if kind not in found:
            found[kind] = load_encoder(tiny_encoders.build(kind, root / kind))
        return found[kind]

    return load


@pytest.fixture(params=["clip", "siglip", "altclip"])
def encoder(request: pytest.FixtureRequest, loaded: Callable[[str], TextEncoder]) -> TextEncoder:
    return loaded(request.param)


def prepared(encoder: TextEncoder, n: int = 30):
    prompts = grammar(n)
    return encoder.tokenise(prompts, slot=True), encoder.tokenise(prompts)


@pytest.mark.parametrize("padding", [False, True])
def test_restarts_in_one_batch_equal_one_after_the_other(encoder: TextEncoder, padding: bool):
    tokens, plain = prepared(encoder)
    clean = clean_outputs(encoder, plain, 7)
    vectors = torch.randn(3, encoder.width, generator=torch.Generator().manual_seed(0))
    together = apply(encoder, encoder, tokens, clean, vectors, padding)
    for i in range(3):
        alone = apply(encoder, encoder, tokens, clean, vectors[i : i + 1], padding)
        for name in ("assimilation", "to_clean", "to_anchor", "pooled"):
            got, expected = getattr(together, name)[i], getattr(alone, name)[0]
            assert torch.allclose(got, expected, atol=1e-5), name


def test_padding_counts_only_when_asked(loaded: Callable[[str], TextEncoder]):
    encoder = loaded("clip")
    tokens, plain = prepared(encoder)
    clean = clean_outputs(encoder, plain, 7)
    vector = torch.zeros(1, encoder.width)
    words, everything = (
        apply(encoder, encoder, tokens, clean, vector, padding) for padding in (False, True)
    )
    assert (everything.assimilation > words.assimilation + 0.02).any()
    assert torch.allclose(everything.pooled, words.pooled, atol=1e-5)


def test_a_step_is_one_run_of_each_encoder(encoder: TextEncoder, monkeypatch):
    calls = []
    real_run = TextEncoder.run

    def counted(self: TextEncoder, tokens, vectors=None, **kwargs):
        calls.append(len(tokens))
        return real_run(self, tokens, vectors, **kwargs)

    tokens, plain = prepared(encoder)
    monkeypatch.setattr(TextEncoder, "run", counted)
    invert(encoder, encoder, tokens, plain, QUICK)
    # A pass is three steps: only in the first are outputs without the embedding new.
    assert calls == [10, 30, 30] * 3 + [30, 30] * 3
    calls.clear()
    surface(encoder, encoder, tokens[:4], plain[:4], torch.zeros(encoder.width), QUICK)
    assert sum(calls) == 4 + 2 * (4 + 25 * 4)
    assert max(calls) <= QUICK.rows
    calls.clear()
    held_out(encoder, encoder, tokens, torch.zeros(3, encoder.width), QUICK)
    assert sum(calls) == 2 * 3 * 30
    assert max(calls) <= QUICK.rows


@pytest.mark.slow
def test_the_search_lowers_its_loss_and_touches_no_weight(encoder: TextEncoder):
    tokens, plain = prepared(encoder)
    before = [weight.clone() for weight in encoder.model.parameters()]
    settings = replace(QUICK, steps=40, batch=30, patience=0, halving=0, radius=0.0)
    settings = replace(settings, learning_rate=0.08)
    found = invert(encoder, encoder, tokens, plain, settings)
    assert found.losses.shape == (40, 3)
    assert (found.losses[-1] < found.losses[0] - 0.02).all()
    after = encoder.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_worse_half_of_the_restarts_is_dropped(encoder: TextEncoder):
    tokens, plain = prepared(encoder)
    settings = replace(QUICK, steps=12, restarts=5, halving=4, patience=0)
    found = invert(encoder, encoder, tokens, plain, settings)
    alive = torch.isfinite(found.losses)
    assert alive.sum(1).tolist() == [5] * 4 + [2] * 4 + [1] * 4
    assert (alive[:-1] >= alive[1:]).all()  # who is dropped stays away
    first = found.losses[2:4].mean(0)
    assert set(first.argsort()[:2].tolist()) == set(alive[4].nonzero()[:, 0].tolist())
    assert found.left == tuple(alive[-1].nonzero()[:, 0].tolist())
    alone = invert(encoder, encoder, tokens, plain, replace(settings, halving=0))
    assert torch.allclose(found.vectors[0], alone.vectors[found.left[0]], atol=1e-4)


def test_embeddings_stay_as_long_as_they_may(encoder: TextEncoder):
    tokens, plain = prepared(encoder)
    usual = encoder.embeddings.norm(dim=1).median()
    settings = replace(QUICK, steps=30, patience=0, halving=0, learning_rate=0.08)
    free = invert(encoder, encoder, tokens, plain, replace(settings, radius=0.0)).vectors
    held = invert(encoder, encoder, tokens, plain, replace(settings, radius=1.1)).vectors
    assert (free.norm(dim=1) > 1.5 * usual).all()
    assert (held.norm(dim=1) <= 1.1001 * usual).all()


def test_prompts_of_like_length_share_batches(encoder: TextEncoder):
    tokens, _ = prepared(encoder, 43)
    batches = _batches(tokens, QUICK, torch.Generator().manual_seed(0))
    seen = [next(batches) for _ in range(8)]
    for one_pass in (seen[:4], seen[4:]):
        assert len(torch.cat(one_pass).unique()) == 40
        ranges = sorted((tokens.lengths[b].min(), tokens.lengths[b].max()) for b in one_pass)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert not all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))
    mixed = _batches(tokens, replace(QUICK, padding=True), torch.Generator().manual_seed(0))
    assert len({int(tokens.lengths[b].max()) for b in (next(mixed) for _ in range(4))}) < 4


def test_held_out_numbers_equal_their_definitions(encoder: TextEncoder):
    tokens, plain = prepared(encoder)
    vectors = torch.randn(2, encoder.width, generator=torch.Generator().manual_seed(1))
    found = held_out(encoder, encoder, tokens, vectors, QUICK)[1]
    with torch.no_grad():
        pooled = encoder.run(tokens, vectors[1:].expand(30, -1)).pooled
    unit = torch.nn.functional.normalize(pooled, dim=-1)
    assert found.agreement == pytest.approx((unit @ unit[0]).tolist(), abs=1e-5)
    assert found.unity == pytest.approx(unit.mean(0).norm().item(), abs=1e-5)
    assert found.anchor == pytest.approx([1.0] * 30, abs=1e-5)


def test_one_restart_that_runs_away_does_not_stop_the_others(
    loaded: Callable[[str], TextEncoder], monkeypatch
):
    encoder = loaded("clip")
    tokens, plain = prepared(encoder)

    def starts(encoder: TextEncoder, restarts: int, generator: torch.Generator) -> torch.Tensor:
        found = torch.zeros(restarts, encoder.width)
        found[0] = torch.inf
        return found

    monkeypatch.setattr("gazeguard.methods.amdet.inversion._starts", starts)
    found = invert(encoder, encoder, tokens, plain, QUICK)
    assert torch.isfinite(found.vectors[1:]).all()
    judged = held_out(encoder, encoder, tokens, found.vectors, QUICK)
    assert [held.finite for held in judged] == [False, True, True]
    with pytest.raises(MeasurementError, match="not finite"):
        invert(encoder, encoder, tokens, plain, replace(QUICK, restarts=1))


def test_whole_model_against_text_model_alone(tmp_path: Path, loaded):
    """One has a projection and the other has not: both are compared without."""
    whole = loaded("clip")
    whole.tokenizer.save_pretrained(tmp_path)
    whole.model.save_pretrained(tmp_path)
    alone = load_encoder(tmp_path)
    assert alone.projection is None
    found = scan_encoder(whole, alone, grammar(120), QUICK)
    assert found.held.anchor == pytest.approx([1.0] * 24, abs=1e-5)


def test_encoders_that_do_not_belong_together(loaded: Callable[[str], TextEncoder]):
    with pytest.raises(MeasurementError, match="other tokens"):
        scan_encoder(loaded("clip"), loaded("longclip"), grammar(120), QUICK)
    with pytest.raises(MeasurementError, match="too few"):
        scan_encoder(loaded("clip"), loaded("clip"), grammar(99), QUICK)
    narrow = loaded("clip")
    wide = load_encoder(narrow.folder)
    wide.width = 64
    with pytest.raises(ModelError, match="width 64"):
        scan_encoder(narrow, wide, grammar(120), QUICK)


def test_long_prompts_are_cut_and_reported(loaded: Callable[[str], TextEncoder]):
    prompts = [f"{'very ' * 30}{prompt}" for prompt in grammar(110)]
    found = scan_encoder(loaded("clip"), loaded("clip"), prompts, QUICK)
    assert found.verdict.evidence[-1].message.startswith(
        "110 prompts are longer than the 77 tokens"
    )
