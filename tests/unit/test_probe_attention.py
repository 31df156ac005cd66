"""The interception, and what the probe does when something is wrong."""

from __future__ import annotations

import threading

import pytest
import torch
from PIL import Image
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gazeguard.errors import ModelError, RowError, UsageError
from gazeguard.lab import tiny
from gazeguard.models.load import load
from gazeguard.probe.attention import attend, probe
from gazeguard.probe.intercept import intercept
from gazeguard.types import ImagePart, Sample, TextPart, Turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def target(folder):
    return load(folder)


def sample(row, text="what colour?", images=1):
    parts = (*(ImagePart(i) for i in range(images)), TextPart(text))
    picture = Image.effect_noise((32, 40), 50 + row).convert("RGB")
    return Sample(row, f"id-{row}", (picture,) * images, (Turn("user", parts),))


def test_handler_sees_only_the_given_modules(target):
    seen = []
    modules = {m: n for m, n in target.attention_modules.items() if n == 2}

    def handler(call):
        seen.append((call.layer, call.backend, tuple(call.query.shape[:2])))
        return call.run()

    inputs = target.encode([sample(0)]).inputs
    with torch.no_grad():
        before = target.model(**inputs).logits
        with intercept(modules, handler):
            watched = target.model(**inputs).logits
    assert seen == [(2, "sdpa", (1, 4))], "one layer, not the vision tower"
    assert torch.equal(before, watched), "watching changed the answer"


def test_handler_can_change_what_the_kernel_gets(target):
    """The way key hiding will take: the same call, with another mask."""
    inputs = target.encode([sample(0)]).inputs
    modules = target.attention_modules

    def blind(call):
        call.value = torch.zeros_like(call.value)
        return call.run()

    with torch.no_grad():
        before = target.model(**inputs).logits
        with intercept(modules, blind):
            changed = target.model(**inputs).logits
        assert torch.equal(before, target.model(**inputs).logits), "the block left something behind"
    assert not torch.allclose(before, changed)


def test_an_exception_restores_everything(target):
    inputs = target.encode([sample(0)]).inputs

    def broken(call):
        raise RuntimeError("handler failed")

    kernel = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    with (
        pytest.raises(RuntimeError, match="handler failed"),
        intercept(target.attention_modules, broken),
    ):
        target.model(**inputs)
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is kernel
    assert attend(target, target.encode([sample(0)])).finite.all()


def test_threads_do_not_see_each_other(target):
    """Two threads on one model, with different samples and layers, get their own rows."""
    jobs = [(target.encode([sample(i, "why? " * (i + 1))]), [i % 4]) for i in range(4)]
    alone = [attend(target, encoded, layers=layers) for encoded, layers in jobs]
    together: dict[int, list] = {i: [] for i in range(4)}
    gate = threading.Barrier(4)

    def work(i):
        gate.wait()
        for _ in range(5):
            together[i].append(attend(target, jobs[i][0], layers=jobs[i][1]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert len(together[i]) == 5, "a thread died"
        assert all(torch.equal(r.weights, alone[i].weights) for r in together[i])


def flash_stand_in(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Flash attention's contract in plain torch: 2-D padding mask or None, causal by itself."""
    keys = key.shape[2]
    allowed = torch.ones(keys, keys, dtype=torch.bool).tril()[None, None]
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        allowed = allowed & attention_mask[:, None, None].bool()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~allowed, -1e9)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_flash_attention(target, padding_side, monkeypatch):
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash_stand_in
    )
    encoded = target.encode([sample(0), sample(1, "and why is it so?")], padding_side)
    expected = attend(target, encoded, reduce_heads=False)
    target.model.config.text_config._attn_implementation = "flash_attention_2"
    masks = []

    def spy(call):
        masks.append((call.backend, call.mask.ndim))
        return call.run()

    with torch.no_grad(), intercept(target.attention_modules, spy):
        target.model(**encoded.inputs)
    assert set(masks) == {("flash_attention_2", 2)}
    rows = attend(target, encoded, reduce_heads=False)
    assert (rows.weights - expected.weights).abs().max() < 1e-5


def test_model_under_accelerate(folder, target):
    encoded = target.encode([sample(0), sample(1)])
    spread = load(folder, device_map="auto")
    assert torch.equal(attend(spread, encoded).weights, attend(target, encoded).weights)


def test_weights_on_disk(folder, target, tmp_path):
    import accelerate

    encoded = target.encode([sample(0)])
    expected = attend(target, encoded).weights
    accelerate.disk_offload(target.model, tmp_path)
    assert torch.equal(attend(target, encoded).weights, expected)


def test_a_layer_that_is_not_seen_is_an_error(target):
    """Attention that goes around the interface, as in remote code of the v4 kind."""
    attention = target.decoder.layers[1].self_attn

    class OwnAttention(nn.Module):
        layer_idx = 1

        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    target.decoder.layers[1].self_attn = OwnAttention()
    with pytest.raises(ModelError, match="layer 1 without transformers' attention interface"):
        attend(target, target.encode([sample(0)]))
    target.decoder.layers[1].self_attn = attention
    attend(target, target.encode([sample(0)]))


def test_nan_in_one_sample_is_reported_for_that_sample(target):
    encoded = target.encode([sample(0), sample(1)])
    encoded.inputs["pixel_values"][1] = float("nan")
    rows = attend(target, encoded)
    assert rows.finite.tolist() == [True, False]


def test_nan_weights_load_and_are_reported(target):
    with torch.no_grad():
        target.model.lm_head.weight[3] = float("nan")
    rows = attend(target, target.encode([sample(0), sample(1)], "right"))
    assert rows.finite.tolist() == [False, False], "broken logits, though attention is fine"
    assert rows.weights.isfinite().all()


def test_rows_can_be_trained_on_and_changed(target):
    """Results are ordinary tensors, not inference-mode ones."""
    rows = attend(target, target.encode([sample(0)]))
    rows.weights.add_(1.0)
    assert not rows.weights.is_inference()


def test_wrong_arguments(target):
    for layers in ("some", [9], [0, 0], []):
        with pytest.raises(UsageError, match=r"layers"):
            attend(target, target.encode([sample(0)]), layers=layers)
    with pytest.raises(UsageError, match="batch size 0"):
        next(probe(target, [sample(0)], batch_size=0))


def test_samples_are_read_lazily(target):
    taken = []

    def stream():
        for i in range(6):
            taken.append(i)
            yield sample(i)

    next(probe(target, stream(), batch_size=2))
    assert taken == [0, 1]


def test_unusable_samples_are_named(target):
    textless = Sample(5, "id-5", (), (Turn("user", (TextPart("no image here"),)),))
    lost = Sample(6, "id-6", (), (Turn("user", (ImagePart(0), TextPart("x"))),))
    with pytest.raises(RowError, match=r"row 5: the prompt has no image"):
        list(probe(target, [sample(0), textless]))
    skipped = {}
    rows = list(
        probe(
            target,
            [sample(0), textless, lost, sample(1)],
            on_skip=lambda s, e: skipped.update({s.row: str(e)}),
        )
    )
    assert [r.sample_id for r in rows] == [("id-0", "id-1")]
    assert "put the image" in skipped[5]
    assert "lacks" in skipped[6]
    assert not list(probe(target, [textless], on_skip=lambda s, e: None))
