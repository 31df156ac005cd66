"""What the guard promises for every family: it disarms the flagged and leaves the rest alone."""

from __future__ import annotations

from inspect import signature

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from gazeguard.guarding.glance import part_of
from gazeguard.lab import tiny
from gazeguard.methods.cleansight.settings import Setting
from gazeguard.models.recognise import frame_of, images, recognise
from gazeguard.probe.attention import attend
from gazeguard.signals.ratio import visual_prompt_ratio
from gazeguard.types import KeyKind, Outcome

from .conftest import sample
from .guards import mask_edited, rigged, steps

families = pytest.mark.parametrize("family", tiny.FAMILIES)
# Whose batches tell several images of a prompt apart, when others in the batch are cut into tiles
# or put next to each other.
TOLD_APART = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3")

ONE_PASS = Setting((1,), "ratio", "whitened", 0.05)
LATE = Setting("all", "log-ratio", "whitened", 0.05)
WIDEN = Setting("all", "log-ratio", "whitened", "widen")
SEARCH = Setting("all", "log-ratio", "whitened", "search")
# Their decoder also gets features of all pictures in one run, in no batch's order.
NOT_ALONE = {"qwen3_vl"}


@pytest.fixture(scope="session")
def equal():
    """Prompts of one length, so that the model gets no mask at all."""
    return [sample(10 + i, [(64, 64)], 0, text) for i, text in enumerate(("colour", "shapes"))]


def hidden_slots(encoded, verdicts):
    """Sample -> the hidden positions of its prompt."""
    found = {}
    for i, verdict in enumerate(verdicts):
        if verdict.tokens is not None:
            slots = encoded.key_kind[i] == KeyKind.IMAGE
            slots[slots.clone()] = torch.from_numpy(
                np.concatenate([one.ravel() for one in verdict.tokens])
            )
            found[i] = slots
    return found


@families
@pytest.mark.parametrize(
    "setting", [ONE_PASS, LATE, WIDEN, SEARCH], ids=["one-pass", "late", "widen", "search"]
)
def test_flagged_equal_the_eager_reference_and_others_do_not_notice(
    family, setting, tiny_target, samples
):
    samples = [samples[0], sample(1, [(64, 64)], 0, "?"), samples[2]]
    target, eager = tiny_target(family), tiny_target(family, "eager")
    encoded = target.encode(samples)
    guard = rigged(target, encoded, {1}, setting)
    plain, plain_logits = steps(target, encoded.inputs)
    with guard.watch(encoded=encoded) as w:
        sequences, logits = steps(target, encoded.inputs)
    assert [v.outcome for v in w.verdicts] == [Outcome.CLEAN, Outcome.FLAGGED, Outcome.CLEAN]
    for i in (0, 2):
        assert torch.equal(logits[:, i], plain_logits[:, i]), f"sample {i} noticed its neighbour"
        assert torch.equal(sequences[i], plain[i])
    hidden = hidden_slots(encoded, w.verdicts)
    assert set(hidden) == {1}
    assert hidden[1].any(), "nothing was hidden, so nothing is tested"
    with mask_edited(eager, hidden, guard.plan.hide_from):
        expected_sequences, expected = steps(eager, encoded.inputs)
    assert torch.equal(expected_sequences, sequences)
    worst = (logits - expected).abs().max().item()
    assert worst < 1e-4, f"off the reference by {worst}"
    change = (logits[:, 1] - plain_logits[:, 1]).abs().max().item()
    assert change > 1e-3, "hiding changed nothing, so nothing is tested"


@families
@pytest.mark.parametrize("setting", [WIDEN, SEARCH], ids=["widen", "search"])
def test_looks_at_flagged_samples_alone_find_what_whole_passes_find(
    family, setting, tiny_target, samples, monkeypatch
):
    target = tiny_target(family)
    encoded = target.encode(samples)
    guard = rigged(target, encoded, {1, 2}, setting)
    rows: list[int] = []
    counting = target.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    found = []
    for alone in (True, False):
        if not alone:
            monkeypatch.setattr("gazeguard.guarding.session.part_of", lambda *inputs: None)
        rows.clear()
        with guard.watch(encoded=encoded) as w:
            sequences, logits = steps(target, encoded.inputs, 2, num_return_sequences=1)
        found.append((sequences, logits, hidden_slots(encoded, w.verdicts)))
        looked = {rows[0]} if not alone or family in NOT_ALONE else {rows[0], 2}
        assert set(rows) == looked, "which samples were run"
    counting.remove()
    (sequences, logits, hidden), (expected, expected_logits, as_hidden) = found
    assert torch.equal(sequences, expected)
    assert torch.equal(logits, expected_logits), "the last pass is the same"
    assert all(torch.equal(hidden[i], as_hidden[i]) for i in (1, 2))


def test_a_decoders_inputs_are_taken_apart_or_not_at_all():
    rows, batch, length = torch.tensor([2, 0]), 3, 5
    values = torch.arange(15).view(3, 5)
    axes = torch.arange(45).view(3, 3, 5)
    masks = {"full_attention": torch.rand(3, 1, 5, 5), "sliding_attention": None}
    got = part_of(
        {
            "inputs_embeds": values,
            "position_ids": axes,
            "attention_mask": masks,
            "cache_position": torch.arange(5),
            "kv": DynamicCache(),
            "use_cache": True,
        },
        rows,
        batch,
        length,
    )
    assert torch.equal(got["inputs_embeds"], values[[2, 0]])
    assert torch.equal(got["position_ids"], axes[:, [2, 0]]), "axes first, as many as samples"
    assert torch.equal(got["attention_mask"]["full_attention"], masks["full_attention"][[2, 0]])
    assert torch.equal(got["cache_position"], torch.arange(5))
    assert "kv" not in got, "a cache is known by what it is, whatever its name"
    assert got["use_cache"] is False
    shared = torch.arange(5)[None]
    assert part_of({"position_ids": shared}, rows, batch, length)["position_ids"] is shared
    for strange in ([values], torch.zeros(7, 5), torch.zeros(3, 1, 5, 64), object()):
        assert part_of({"x": strange}, rows, batch, length) is None


def reference_tokens(eager, encoded, guard):
    """The paper's rule from eager attention maps: bool `(sample, position)`."""
    with torch.no_grad():
        maps = eager.model(**encoded.inputs, output_attentions=True, use_cache=False).attentions
    strongest = maps[guard.plan.pick[0]][:, :, -1].amax(1)
    image = encoded.key_kind == KeyKind.IMAGE
    return image & (strongest * image.sum(1, keepdim=True) > guard.setting.prune)


@families
def test_hidden_tokens_are_those_above_tau(family, tiny_target, samples):
    target, eager = tiny_target(family), tiny_target(family, "eager")
    encoded = target.encode(samples)
    guard = rigged(target, encoded, {0, 1, 2}, ONE_PASS)
    with guard.watch("detect", encoded=encoded) as w:
        steps(target, encoded.inputs, 1)
    found = hidden_slots(encoded, w.verdicts)
    expected = reference_tokens(eager, encoded, guard)
    assert torch.equal(torch.stack([found[i] for i in range(3)]), expected)
    for verdict, known in zip(w.verdicts, encoded.images, strict=True):
        assert [one.shape for one in verdict.tokens] == [image.shape for image in known]
        assert not verdict.hidden, "detect hides nothing"


@families
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("setting", [ONE_PASS, WIDEN], ids=["one-pass", "widen"])
def test_without_padding_the_batch_keeps_its_kernel_path(
    family, backend, setting, tiny_target, equal
):
    """With sdpa there is no mask to write into, and the neighbour must not get one."""
    target, eager = tiny_target(family, backend), tiny_target(family, "eager")
    encoded = target.encode(equal)
    assert encoded.inputs["attention_mask"].all(), "the batch should need no padding"
    guard = rigged(target, encoded, {0}, setting)
    plain, plain_logits = steps(target, encoded.inputs)
    with guard.watch() as w:
        sequences, logits = steps(target, encoded.inputs)
    assert torch.equal(logits[:, 1], plain_logits[:, 1])
    assert torch.equal(sequences[1], plain[1])
    hidden = hidden_slots(encoded, w.verdicts)
    assert set(hidden) == {0}
    with mask_edited(eager, hidden, guard.plan.hide_from):
        _, expected = steps(eager, encoded.inputs)
    assert (logits - expected).abs().max() < 1e-4
    assert (logits[:, 0] - plain_logits[:, 0]).abs().max() > 1e-3


@families
@pytest.mark.parametrize("setting", [ONE_PASS, WIDEN], ids=["one-pass", "widen"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_static_cache(family, setting, padding_side, tiny_target, samples):
    if family == "gemma3" and padding_side == "right":
        pytest.skip("sdpa and eager differ by themselves where a sliding window sees only padding")
    target, eager = tiny_target(family), tiny_target(family, "eager")
    encoded = target.encode([samples[0], sample(1, [(64, 64)], 0, "?")], padding_side)
    guard = rigged(target, encoded, {1}, setting)
    _, plain_logits = steps(target, encoded.inputs, cache_implementation="static")
    with guard.watch() as w:
        _, logits = steps(target, encoded.inputs, cache_implementation="static")
    assert torch.equal(logits[:, 0], plain_logits[:, 0])
    with mask_edited(eager, hidden_slots(encoded, w.verdicts), guard.plan.hide_from):
        _, expected = steps(eager, encoded.inputs)
    assert (logits - expected).abs().max() < 1e-4
    assert (logits[:, 1] - plain_logits[:, 1]).abs().max() > 1e-3


@families
def test_beams_share_their_samples_verdict(family, tiny_target, samples):
    target, eager = tiny_target(family), tiny_target(family, "eager")
    encoded = target.encode([samples[0], sample(1, [(64, 64)], 0, "?")])
    guard = rigged(target, encoded, {1}, WIDEN)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    plain, plain_logits = steps(target, encoded.inputs, **beams)
    with guard.watch() as w:
        found, logits = steps(target, encoded.inputs, **beams)
    assert [v.outcome for v in w.verdicts] == [Outcome.CLEAN, Outcome.FLAGGED]
    assert torch.equal(found[:2], plain[:2])
    assert torch.equal(logits[:, :3], plain_logits[:, :3])
    (slots,) = hidden_slots(encoded, w.verdicts).values()
    with mask_edited(eager, dict.fromkeys((3, 4, 5), slots), guard.plan.hide_from):
        expected, expected_logits = steps(eager, encoded.inputs, **beams)
    assert torch.equal(found, expected)
    assert (logits - expected_logits).abs().max() < 1e-4


@families
def test_a_batch_of_ones_own_processor_is_recognised(family, tiny_target, samples):
    """Token ids alone give the kinds, grids and verdicts that our own encoding gives."""
    target = tiny_target(family)
    more = [
        *samples[:2],
        sample(3, [(40, 60)], "words first, then", 0),
        sample(4, [(64, 64)], 0, "  spaces, é 中文\nand lines\n"),
        sample(5, [(64, 64)], 0, "user\nassistant"),
        sample(6, [(30, 30), (50, 90)], 0, 1, "two images"),
    ]
    frame = frame_of(target)
    for side in ("left", "right"):
        encoded = target.encode(more, side)
        inputs = encoded.inputs
        kind = recognise(target, frame, inputs["input_ids"], inputs["attention_mask"])
        assert torch.equal(kind, encoded.key_kind)
        found = images(target, kind, inputs)
        alone = [i for i, one in enumerate(more) if len(one.images) == 1]
        assert [found[i] for i in alone] == [encoded.images[i] for i in alone]
        totals = [[sum(image.count for image in one) for one in e] for e in (found, encoded.images)]
        assert totals[0] == totals[1]
        if family in TOLD_APART:
            assert found == encoded.images
        else:
            assert [len(one) for one in found] == [1] * len(more), "several images count as one"
    guard = rigged(target, encoded, {1}, ONE_PASS)
    with guard.watch(encoded=encoded) as told, torch.no_grad():
        target.model(**encoded.inputs)
    with guard.watch() as guessed, torch.no_grad():
        target.model(**encoded.inputs)
    for a, b in zip(told.verdicts, guessed.verdicts, strict=True):
        assert a.as_json() | {"images": None} == b.as_json() | {"images": None}
    slots = [hidden_slots(encoded, w.verdicts) for w in (told, guessed)]
    assert slots[0].keys() == slots[1].keys() >= {1}
    assert all(torch.equal(slots[0][i], slots[1][i]) for i in slots[0])
    assert len(told.verdicts) == len(more)


@families
def test_scores_in_the_prefill_equal_those_of_the_probe(family, tiny_target, samples):
    """Calibration looks with the probe, traffic is judged inside `generate`."""
    target = tiny_target(family)
    encoded = target.encode(samples)
    guard = rigged(target, encoded, {1}, WIDEN)
    rows = attend(target, encoded, reduce_heads=False)
    ratio = visual_prompt_ratio(rows.weights, rows.key_kind).numpy()
    expected = guard.detector.score(ratio)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        with guard.watch("detect", encoded=encoded) as w:
            steps(target, encoded.inputs, 2, **options)
        scores = np.array([v.score for v in w.verdicts])
        assert np.abs(scores - expected).max() < 1e-3 * (1 + np.abs(expected).max()), options


@families
def test_pictures_that_were_encoded_beforehand_are_guarded_alike(family, tiny_target, samples):
    """`generate` does it by itself; a server that caches picture features hands them over."""
    target = tiny_target(family)
    encoded = target.encode(samples)
    guard = rigged(target, encoded, {1}, WIDEN)
    features = target.base.base_model.get_image_features
    taken = [name for name in signature(features).parameters if name in encoded.inputs]
    with torch.no_grad():
        pictures = features(**{name: encoded.inputs[name] for name in taken}, return_dict=True)
    inputs = {n: value for n, value in encoded.inputs.items() if not n.startswith("pixel_")}
    _, plain = steps(target, encoded.inputs)
    with guard.watch() as w:
        _, expected = steps(target, encoded.inputs)
    with guard.watch() as beforehand:
        _, logits = steps(target, inputs, mm_encoder_outputs={"image": pictures})
    assert torch.equal(logits[:, [0, 2]], plain[:, [0, 2]])
    scores = [[v.score for v in one.verdicts] for one in (w, beforehand)]
    assert scores[0] == scores[1]
    assert beforehand.verdicts[1].tokens is not None
    with guard.watch(encoded=encoded) as told:  # the pictures' sizes are known again
        _, logits = steps(target, inputs, mm_encoder_outputs={"image": pictures})
    assert torch.equal(logits, expected)
    assert [v.as_json() for v in told.verdicts][1] == w.verdicts[1].as_json()
