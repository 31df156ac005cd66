"""Hiding keys from a kernel, against a naive softmax that never sees them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from gazeguard.errors import ModelError
from gazeguard.probe.hide import run_hiding
from gazeguard.probe.intercept import AttentionCall

SAMPLES, HEADS, GROUPS, KEYS, CHANNELS = 3, 4, 2, 7, 8
TRIANGLE = torch.ones(KEYS, KEYS, dtype=torch.bool).tril()


class Attention(nn.Module):
    """An attention module as transformers writes them."""

    is_causal = True
    num_key_value_groups = HEADS // GROUPS


def flash(module, query, key, value, mask, scaling=None, sliding_window=None, **options):
    """A stand-in for flash attention: 2-D padding masks, causality from the bottom right corner.

    Scores that it gets are all it knows; hidden keys must be in its channels.
    """
    samples, heads, queries, channels = query.shape
    keys = key.shape[2]
    assert value.shape[-1] == channels, "flash kernels want one width"
    assert channels % 8 == 0
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (scaling or channels**-0.5)
    slots = torch.arange(keys)
    at = torch.arange(queries)[:, None] + keys - queries
    seen = slots <= at
    if sliding_window is not None:
        seen = seen & (slots > at - sliding_window)
    seen = seen.expand(samples, 1, queries, keys)
    if mask is not None:
        seen = seen & mask[:, None, None].bool()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    return (weights @ value).transpose(1, 2), None


def a_call(kernel, backend, mask=None, queries=KEYS, keys=KEYS, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query = noise(SAMPLES, HEADS, queries, CHANNELS)
    key, value = (noise(SAMPLES, GROUPS, keys, CHANNELS) for _ in "kv")
    options = {"scaling": 0.4, **options}
    return AttentionCall(1, backend, Attention(), query, key, value, mask, options, kernel)


def naive(call, seen):
    """Attention of the visible keys `(sample, query, key)` alone, `(sample, query, head, c)`."""
    query, key, value = call.query.double(), call.key.double(), call.value.double()
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * call.options["scaling"]
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


def additive(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


PADDED = TRIANGLE.repeat(SAMPLES, 1, 1)
PADDED[0, :, :2] = False
PADDED[0, :2, 0] = True  # nobody looks at what padding sees, but it must not be NaN
PADDED2D = torch.ones(SAMPLES, KEYS, dtype=torch.long)
PADDED2D[0, :2] = 0
CASES = {
    "sdpa without mask": (sdpa_attention_forward, "sdpa", None, TRIANGLE.repeat(SAMPLES, 1, 1)),
    "sdpa bool": (sdpa_attention_forward, "sdpa", PADDED[:, None], PADDED),
    "sdpa one mask for all": (
        sdpa_attention_forward,
        "sdpa",
        TRIANGLE[None, None],
        TRIANGLE.repeat(SAMPLES, 1, 1),
    ),
    "sdpa additive": (sdpa_attention_forward, "sdpa", additive(PADDED)[:, None], PADDED),
    "eager": (eager_attention_forward, "eager", additive(PADDED)[:, None], PADDED),
    "flash": (flash, "flash_attention_2", None, TRIANGLE.repeat(SAMPLES, 1, 1)),
    "flash padded": (flash, "flash_attention_2", PADDED2D, PADDED),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chosen", [[1], [0, 2], [0, 1, 2]], ids=str)
def test_hidden_keys_get_nothing_and_others_do_not_notice(case, chosen):
    kernel, backend, mask, seen = CASES[case]
    call = a_call(kernel, backend, mask)
    untouched, _ = a_call(kernel, backend, mask).run()
    hidden = torch.zeros(len(chosen), KEYS, dtype=torch.bool)
    hidden[:, 3] = True
    hidden[-1, 4:6] = True
    output, _ = run_hiding(call, torch.tensor(chosen), hidden)
    seen = seen.clone()
    for place, keys in zip(chosen, hidden, strict=True):
        seen[place] &= ~keys
    expected = naive(call, seen)
    for i in range(SAMPLES):
        if i not in chosen:
            assert torch.equal(output[i], untouched[i]), f"sample {i} noticed"
            continue
        real = seen[i].any(-1)
        real[:2] &= i != 0 or "padded" not in case  # flash leaves padding's own queries blank
        worst = (output[i].double() - expected[i])[real].abs().max().item()
        assert worst < 1e-5, f"sample {i} is off by {worst}"
        assert (output[i] - untouched[i]).abs().max() > 1e-3
    assert output.isfinite().all()


@pytest.mark.parametrize("case", ["sdpa without mask", "eager", "flash"])
def test_decoding_step(case):
    """One query and a cache; flash and sdpa have no mask then, eager a row of one."""
    kernel, backend, _, _ = CASES[case]
    for mask in [torch.zeros(SAMPLES, 1, 1, KEYS), None] if backend == "eager" else [None]:
        call = a_call(kernel, backend, mask, queries=1)
        hidden = torch.zeros(1, KEYS, dtype=torch.bool)
        hidden[0, 2:5] = True
        output, _ = run_hiding(call, torch.tensor([1]), hidden)
        seen = torch.ones(SAMPLES, 1, KEYS, dtype=torch.bool)
        seen[1, 0] = ~hidden[0]
        assert (output.double() - naive(call, seen)).abs().max() < 1e-5


def test_static_cache_has_empty_slots_behind_the_prompt():
    call = a_call(sdpa_attention_forward, "sdpa", None, queries=4)
    hidden = torch.zeros(1, KEYS, dtype=torch.bool)
    hidden[0, 1] = True
    output, _ = run_hiding(call, torch.tensor([0]), hidden)
    seen = torch.ones(4, KEYS, dtype=torch.bool).tril().repeat(SAMPLES, 1, 1)
    seen[0] &= ~hidden[0]
    assert (output.double() - naive(call, seen)).abs().max() < 1e-5


def test_kernel_that_looks_both_ways():
    call = a_call(sdpa_attention_forward, "sdpa", None, is_causal=False)
    hidden = torch.zeros(SAMPLES, KEYS, dtype=torch.bool)
    hidden[:, 6] = True
    output, _ = run_hiding(call, torch.arange(SAMPLES), hidden)
    seen = torch.ones(SAMPLES, KEYS, KEYS, dtype=torch.bool) & ~hidden[:, None]
    assert (output.double() - naive(call, seen)).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["sdpa without mask", "sdpa bool", "eager", "flash"])
def test_a_query_that_sees_only_hidden_keys_is_finite(case):
    """A prompt that begins with the image: NaN there would spread through weights of zero."""
    kernel, backend, mask, _ = CASES[case]
    hidden = torch.zeros(1, KEYS, dtype=torch.bool)
    hidden[0, :3] = True
    output, _ = run_hiding(a_call(kernel, backend, mask), torch.tensor([1]), hidden)
    assert output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["sdpa without mask", "flash"])
def test_half_precision_hides_completely(case, dtype):
    """Hidden values are huge: the smallest weight on them would show."""
    kernel, backend, mask, _ = CASES[case]
    call = a_call(kernel, backend, mask, dtype=dtype)
    hidden = torch.zeros(1, KEYS, dtype=torch.bool)
    hidden[0, 3] = True
    quiet, _ = run_hiding(call, torch.tensor([1]), hidden)
    call.value[1, :, 3] = 3e4
    call.key[1, :, 3] = 100.0
    loud, _ = run_hiding(call, torch.tensor([1]), hidden)
    visible = [0, 1, 2, 4, 5, 6]  # the hidden token itself sees nothing else it may not see
    assert torch.equal(quiet[1, visible], loud[1, visible])


def test_options_per_sample_follow_their_samples():
    seen = {}

    def kernel(module, query, key, value, mask, **options):
        seen[query.shape[0]] = options
        return torch.zeros(query.shape[0], query.shape[2], HEADS, CHANNELS), None

    positions = torch.arange(SAMPLES * KEYS).view(SAMPLES, KEYS)
    bias, sinks = torch.randn(SAMPLES, HEADS, KEYS, KEYS), torch.randn(SAMPLES)
    call = a_call(kernel, "sdpa", None, position_ids=positions, position_bias=bias, s_aux=sinks)
    run_hiding(call, torch.tensor([0, 2]), torch.zeros(2, KEYS, dtype=torch.bool))
    assert torch.equal(seen[2]["position_ids"], positions[[0, 2]])
    assert torch.equal(seen[2]["position_bias"], bias[[0, 2]])
    assert torch.equal(seen[2]["s_aux"], sinks), "as many heads as samples is a coincidence"


def test_eager_weights_are_those_of_the_edited_call():
    call = a_call(eager_attention_forward, "eager", additive(PADDED)[:, None])
    hidden = torch.zeros(1, KEYS, dtype=torch.bool)
    hidden[0, 2] = True
    _, weights = run_hiding(call, torch.tensor([1]), hidden)
    assert (weights[1, :, 3:, 2] == 0).all()
    assert (weights[2, :, 3:, 2] > 0).all()


@pytest.mark.parametrize(
    ("backend", "mask", "queries", "options", "cure"),
    [
        ("flex_attention", object(), KEYS, {}, "sdpa"),
        ("eager", None, KEYS, {}, "sdpa"),
        ("flash_attention_2", None, KEYS, {"softcap": 30.0}, "eager"),
    ],
)
def test_kernels_that_cannot_hide_are_refused(backend, mask, queries, options, cure):
    call = a_call(flash, backend, mask, queries, **options)
    with pytest.raises(ModelError, match=cure):
        run_hiding(call, torch.arange(SAMPLES), torch.ones(SAMPLES, KEYS, dtype=torch.bool))


def test_flash_heads_that_are_too_wide_are_refused():
    call = a_call(flash, "flash_attention_2")
    call.query, call.key, call.value = (
        x.repeat(1, 1, 1, 32) for x in (call.query, call.key, call.value)
    )
    with pytest.raises(ModelError, match="sdpa"):
        run_hiding(call, torch.tensor([0]), torch.ones(1, KEYS, dtype=torch.bool))
