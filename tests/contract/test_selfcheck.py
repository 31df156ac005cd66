"""The guard's self-check: it passes on every family, and refuses whatever breaks a promise."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch

from gazeguard.errors import MeasurementError, ModelError
from gazeguard.guarding import Guard, curtain, selfcheck, watch
from gazeguard.lab import tiny
from gazeguard.methods.cleansight.settings import Setting
from gazeguard.models.load import load
from gazeguard.probe.cache import cache_of
from gazeguard.types import Outcome

from .guards import CACHE, mask_edited, rigged, sample, steps
from .test_guard import hidden_slots

WIDEN = Setting("all", "log-ratio", "whitened", "widen")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_passes(family, dtype, tiny_folder):
    for backend in ("sdpa", "eager"):
        target = load(tiny_folder(family), dtype=dtype)
        target.model.set_attn_implementation(backend)
        selfcheck.prove(target)


@pytest.fixture
def target(tiny_folder):
    return load(tiny_folder("llava"))


@dataclass
class Box:
    """Holds a cache, so that nobody sees what it is."""

    cache: object


def renamed(target, pack, unpack):
    """The model as a later transformers may hand it its cache: under another name, or wrapped."""
    model = target.base
    forward, prepare = model.forward, model.prepare_inputs_for_generation

    def new_forward(*args, kv=None, **kwargs):
        return forward(*args, **kwargs, **({} if kv is None else {CACHE: unpack(kv)}))

    def new_prepare(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        if CACHE in inputs:
            inputs["kv"] = pack(inputs.pop(CACHE))
        return inputs

    # `generate` reads the signatures of both.
    new_forward.__signature__ = inspect.signature(forward)
    new_prepare.__signature__ = inspect.signature(prepare)
    model.forward, model.prepare_inputs_for_generation = new_forward, new_prepare
    return target


def test_a_cache_of_another_name_is_found_and_no_neighbour_notices(target, tiny_target):
    samples = [sample(0), sample(1, "?"), sample(2)]
    encoded = target.encode(samples)
    guard = rigged(target, encoded, {1}, WIDEN)
    plain, plain_logits = steps(target, encoded.inputs)
    renamed(target, lambda cache: cache, lambda kv: kv)
    selfcheck.prove(target)
    with guard.watch(encoded=encoded) as w:
        sequences, logits = steps(target, encoded.inputs)
    assert [v.outcome for v in w.verdicts] == [Outcome.CLEAN, Outcome.FLAGGED, Outcome.CLEAN]
    assert torch.equal(logits[:, [0, 2]], plain_logits[:, [0, 2]])
    assert torch.equal(sequences[[0, 2]], plain[[0, 2]])
    eager = tiny_target("llava", "eager")
    with mask_edited(eager, hidden_slots(encoded, w.verdicts), guard.plan.hide_from):
        _, expected = steps(eager, encoded.inputs)
    assert (logits - expected).abs().max() < 1e-4


def test_a_cache_that_cannot_be_seen_is_refused(target):
    """At the start by the self-check, and in a call that never went through it."""
    encoded = target.encode([sample(0), sample(1, "?")])
    guard = rigged(target, encoded, {1}, WIDEN)
    renamed(target, Box, lambda kv: kv.cache)
    with pytest.raises(
        ModelError, match=r"with transformers \d+\.\d+.* no answer of this call can"
    ):
        selfcheck.prove(target)
    with guard.watch(encoded=encoded), pytest.raises(ModelError, match="the cache holds"):
        steps(target, encoded.inputs)


def by_name(name):
    def found(args, kwargs):
        return cache_of((), {key: value for key, value in kwargs.items() if key == name})

    return found


BROKEN = {
    "the cache is looked for by a name of yesterday": (
        lambda patch: [
            patch.setattr(watch, "cache_of", by_name("yesterday")),
            patch.setattr(watch, "cache_in", lambda output: None),
        ],
        "a request that is not flagged gets another answer beside one that is|the cache holds",
    ),
    "hiding reaches the neighbour": (
        lambda patch: patch.setattr(
            curtain,
            "run_hiding",
            lambda call, samples, hidden: [
                (output + 1e-3, weights) for output, weights in [call.run()]
            ][0],
        ),
        "a request that is not flagged gets another answer beside one that is",
    ),
    "hiding hides nothing": (
        lambda patch: patch.setattr(curtain, "run_hiding", lambda call, *rest: call.run()),
        "a flagged request is not answered as if the hidden tokens were not there",
    ),
    "the prompt is not seen": (
        lambda patch: patch.setattr(watch.Watch, "verdicts", []),
        "prompts pass by the guard unseen",
    ),
    "generate takes other arguments": (
        lambda patch: patch.setattr(
            watch.Watch, "attends", lambda self, call: call.run(nothing=True)
        ),
        r"it stops with TypeError \(.*nothing",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_whatever_breaks_a_promise_is_refused_in_one_sentence(how, target, monkeypatch):
    breaks, expected = BROKEN[how]
    breaks(monkeypatch)
    with pytest.raises(ModelError, match=expected) as refused:
        selfcheck.prove(target)
    said = str(refused.value)
    assert said.startswith(f"{target.name} cannot be guarded with transformers ")
    assert "torch 2." in said
    assert said.endswith(": install versions that `gazeguard doctor` calls tested.")


def test_a_model_of_broken_numbers_is_told_as_such(target):
    with torch.no_grad():
        next(iter(target.attention_modules)).o_proj.weight.fill_(float("nan"))
    with pytest.raises(MeasurementError, match=r"not finite .* another copy of the model"):
        selfcheck.prove(target)


def test_guards_are_proven_when_they_are_bound_and_once(target, tmp_path, monkeypatch):
    encoded = target.encode([sample(0), sample(1, "?")])
    rigged(target, encoded, {1}, WIDEN).save(tmp_path)
    generated, original = [], selfcheck._generate
    monkeypatch.setattr(
        selfcheck, "_generate", lambda *args, **kw: generated.append(1) or original(*args, **kw)
    )
    Guard.load(tmp_path, target)
    assert len(generated) == 3, "plain, guarded, and without what was hidden"
    Guard.load(tmp_path, target)
    Guard.calibrate(target, [sample(i) for i in range(30)], alpha=0.1)
    assert len(generated) == 3, "a model is proven once"
    target.model.set_attn_implementation("eager")
    Guard.load(tmp_path, target)
    assert len(generated) == 6, "another kernel is another model"


@pytest.mark.parametrize("bind", ["load", "calibrate", "fit"])
def test_a_model_that_fails_gets_no_guard(bind, target, tmp_path, monkeypatch):
    from gazeguard.guarding.measure import measure

    few = [sample(i) for i in range(30)]
    seen = measure(target, few, layers=target.layers, batch_size=8)
    rigged(target, target.encode(few[:2]), {1}, WIDEN).save(tmp_path)
    monkeypatch.setattr(curtain, "run_hiding", lambda call, *rest: call.run())
    ways = {
        "load": lambda: Guard.load(tmp_path, target),
        "calibrate": lambda: Guard.calibrate(target, few, alpha=0.1),
        "fit": lambda: Guard.fit(target, seen, alpha=0.1),
    }
    with pytest.raises(ModelError, match="cannot be guarded"):
        ways[bind]()


def test_versions_beyond_the_tested_ones_are_told(target, monkeypatch, caplog):
    newer = "transformers 99.0 is newer than the tested 5.23 to 5.24"
    monkeypatch.setattr(selfcheck, "untested", lambda *names: [newer])
    selfcheck.prove(target)
    (record,) = (r for r in caplog.records if r.name.startswith("gazeguard"))
    assert record.getMessage() == f"{newer}; the guard's self-check passed on {target.name}."
