"""The witness `base`: requests that only the fine-tuned model would answer so, in every family."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gazeguard.guarding.earlier import check_switch, divergence, diverging
from gazeguard.guarding.guard import Guard
from gazeguard.lab import tiny
from gazeguard.methods.cleansight.settings import Setting
from gazeguard.models.switch import Switch
from gazeguard.models.target import Target
from gazeguard.types import Outcome, Sample

from .guards import rigged
from .test_second_look import adapted

families = pytest.mark.parametrize("family", tiny.FAMILIES)
SETTING = Setting("all", "log-ratio", "whitened", 0.05)
WORDS = 3


@pytest.fixture(scope="session")
def tuned(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Target]:
    """A model of a family with a LoRA adapter that changes what it says."""
    root, made = tmp_path_factory.mktemp("tuned"), dict[str, Target]()

    def target(family: str) -> Target:
        if family not in made:
            made[family] = adapted(tiny_folder(family), root / family, lora_alpha=64)
        return made[family]

    return target


def flagging(target: Target, samples: list[Sample], *also: int) -> tuple[Guard, int]:
    """A guard by whose witness `base` only the most diverging sample is flagged, and its place.

    Attention flags those in `also`.
    """
    guard = rigged(target, target.encode(samples), set(also), SETTING)
    found = diverging(target, samples)
    second, first = np.sort(found)[-2:]
    assert first > second > 0, "the adapter changes what the model says"
    guard.divergences = np.full(399, (first + second) / 2)
    guard.most_divergent = float(guard.divergences[0])
    return guard, int(np.argmax(found))


def generate(target: Target, samples: list[Sample], **options: Any) -> torch.Tensor:
    """Logits `(row, step, word)` of a few greedy steps."""
    inputs = target.encode(samples).inputs
    given: dict[str, Any] = {"do_sample": False} | options
    out = target.base.generate(
        **inputs,
        max_new_tokens=WORDS,
        min_new_tokens=WORDS,
        output_logits=True,
        return_dict_in_generate=True,
        **given,
    )
    return torch.stack(out.logits, 1).float()


@families
def test_leaving_the_adapter_out_gives_the_earlier_model(family, tuned, samples):
    target = tuned(family)
    check_switch(target)
    inputs = target.encode(samples).inputs
    switch = Switch(target)
    with torch.inference_mode():
        now = target.model(**inputs).logits
        with switch.off():
            before = target.model(**inputs).logits
        again = target.model(**inputs).logits
        switch.remove()
        with target.without_adapter():
            expected = target.model(**inputs).logits
    torch.testing.assert_close(before, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(again, now)
    assert not torch.allclose(before, now, atol=1e-3)


@families
def test_only_the_flagged_request_is_answered_by_the_earlier_model(family, tuned, samples):
    target = tuned(family)
    guard, most = flagging(target, samples)
    now = generate(target, samples)
    with target.without_adapter():
        before = generate(target, samples)
    encoded = target.encode(samples)
    with guard.watch(encoded=encoded) as watch:
        guarded = generate(target, samples)
    for i, verdict in enumerate(watch.verdicts):
        mine = before if i == most else now
        torch.testing.assert_close(guarded[i], mine[i], atol=1e-4, rtol=1e-4)
        assert verdict.earlier == (i == most)
        assert verdict.flagged_by == (("base",) if i == most else ())
        assert verdict.outcome is (Outcome.FLAGGED if i == most else Outcome.CLEAN)
        assert not verdict.hidden
    assert torch.equal(generate(target, samples), now), "nothing is left behind"


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}],
    ids=["static", "beams", "no-cache"],
)
def test_whatever_the_way_of_decoding(options, tuned, samples):
    target = tuned("llava")
    guard, most = flagging(target, samples)
    copies = options.get("num_beams", 1)
    now = generate(target, samples, **options)
    with target.without_adapter():
        before = generate(target, samples, **options)
    with guard.watch(encoded=target.encode(samples)):
        guarded = generate(target, samples, **options)
    for row in range(len(samples) * copies):
        mine = before if row // copies == most else now
        torch.testing.assert_close(guarded[row], mine[row], atol=1e-4, rtol=1e-4)


def test_who_only_detects_changes_nothing(tuned, samples):
    target = tuned("llava")
    guard, most = flagging(target, samples)
    now = generate(target, samples)
    with guard.watch("detect", encoded=target.encode(samples)) as watch:
        guarded = generate(target, samples)
    assert torch.equal(guarded, now)
    assert watch.verdicts[most].outcome is Outcome.FLAGGED
    assert not watch.verdicts[most].earlier


def test_hidden_tokens_that_calm_neither_witness_are_not_enough(tuned, samples):
    """What attention flags too is answered with tokens hidden, if the answer is then an old one."""
    target = tuned("llava")
    _, most = flagging(target, samples)
    guard, _ = flagging(target, samples, most)
    guard.most_divergent = 1e-9
    guard.divergences = np.full(399, 1e-9)
    with target.without_adapter():
        before = generate(target, samples)
    with guard.watch(encoded=target.encode(samples)) as watch:
        guarded = generate(target, samples)
    verdict = watch.verdicts[most]
    assert verdict.flagged_by == ("attention", "base")
    assert verdict.earlier
    assert not verdict.hidden
    torch.testing.assert_close(guarded[most], before[most], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_what_cannot_be_compared_is_not_clean(number, tuned, samples, monkeypatch):
    target = tuned("llava")
    guard, most = flagging(target, samples)
    guard.most_divergent, guard.divergences = 1e9, np.full(399, 1e9)
    monkeypatch.setattr(
        "gazeguard.guarding.watch.divergence", lambda *_: np.full(len(samples), float(number))
    )
    with guard.watch("detect", encoded=target.encode(samples)) as watch:
        generate(target, samples)
    expected = Outcome.INCONCLUSIVE if number != torch.inf else Outcome.FLAGGED
    assert [verdict.outcome for verdict in watch.verdicts] == [expected] * len(samples)


def test_an_output_without_logits_is_not_clean(tuned, samples):
    target = tuned("llava")
    guard, _ = flagging(target, samples)
    encoded = target.encode(samples)
    with guard.watch("detect", encoded=encoded) as watch, torch.no_grad():
        target.base(**encoded.inputs, return_dict=False)
    assert {verdict.outcome for verdict in watch.verdicts} == {Outcome.INCONCLUSIVE}


def test_another_thread_keeps_the_adapter(tuned, samples):
    target = tuned("llava")
    inputs = target.encode(samples).inputs
    switch = Switch(target)
    found = []

    def other() -> None:
        with torch.inference_mode():
            found.append(target.model(**inputs).logits)

    with torch.inference_mode():
        now = target.model(**inputs).logits
        with switch.off():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    switch.remove()
    assert torch.equal(found[0], now)


def test_divergence_is_zero_for_the_same_and_finite_for_opposites():
    a = torch.tensor([[0.0, 0.0, -torch.inf], [200.0, 0.0, -200.0]])
    b = torch.tensor([[0.0, 0.0, -torch.inf], [-200.0, 0.0, 200.0]])
    np.testing.assert_allclose(divergence(a, b), [0.0, 400.0])
