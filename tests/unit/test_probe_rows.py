"""One attention row per sample, against a naive softmax over the whole map."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gazeguard.errors import ModelError
from gazeguard.probe.intercept import AttentionCall
from gazeguard.probe.rows import row

SAMPLES, HEADS, GROUPS, KEYS, CHANNELS = 2, 4, 2, 7, 8


class Attention(nn.Module):
    """An attention module as transformers writes them; causal unless it says otherwise."""

    is_causal = True


def call_with(mask=None, backend="sdpa", queries=KEYS, **options):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(SAMPLES, HEADS, queries, CHANNELS, generator=generator)
    key = torch.randn(SAMPLES, GROUPS, KEYS, CHANNELS, generator=generator)
    return AttentionCall(0, backend, Attention(), query, key, key, mask, options, lambda *a: None)


def naive(call, last, allowed, scaling=None, softcap=None, sink=None):
    """Head by head, key by key."""
    out = torch.zeros(SAMPLES, HEADS, KEYS)
    for i in range(SAMPLES):
        for head in range(HEADS):
            q = call.query[i, head, last[i]]
            scores = {}
            for j in allowed[i]:
                k = call.key[i, head // (HEADS // GROUPS), j]
                score = float(q @ k) * (scaling or CHANNELS**-0.5)
                scores[j] = math.tanh(score / softcap) * softcap if softcap else score
            total = sum(math.exp(s) for s in scores.values())
            total += math.exp(sink[head]) if sink is not None else 0.0
            for j, score in scores.items():
                out[i, head, j] = math.exp(score) / total
    return out


def assert_row(call, last, allowed, **naive_options):
    got = row(call, torch.tensor(last))
    worst = (got - naive(call, last, allowed, **naive_options)).abs().max().item()
    assert worst < 1e-6, f"row is off by {worst}"
    assert got.dtype == torch.float32


everything = [list(range(KEYS))] * SAMPLES


def test_without_mask_the_last_query_sees_every_key():
    assert_row(call_with(), [6, 6], everything)


def test_without_mask_an_earlier_query_is_causal():
    assert_row(call_with(), [6, 3], [list(range(7)), list(range(4))])


def test_bidirectional_module_without_mask():
    assert_row(call_with(is_causal=False), [6, 3], everything)


def test_scaling_softcap_and_sink():
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0])
    call = call_with(scaling=0.7, softcap=1.5, s_aux=sink)
    assert_row(call, [6, 6], everything, scaling=0.7, softcap=1.5, sink=sink.tolist())


def left_padded_sliding():
    """Keys seen per sample: two pads on the left of the second, a window of three."""
    return [[4, 5, 6], [4, 5, 6]], [[2, 3, 4], [3, 4]]


def test_bool_mask_with_left_padding_and_sliding_window():
    for last, allowed in zip(([6, 6], [4, 4]), left_padded_sliding(), strict=True):
        mask = torch.zeros(SAMPLES, 1, KEYS, KEYS, dtype=torch.bool)
        for i in range(SAMPLES):
            mask[i, 0, last[i], allowed[i]] = True
        assert_row(call_with(mask), last, allowed)


def test_additive_mask_with_an_image_that_sees_both_ways():
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((1, 1, KEYS, KEYS), lowest).triu(1)
    mask[..., 1:4, 1:4] = 0.0
    assert_row(call_with(mask, "eager"), [6, 2], [list(range(7)), [0, 1, 2, 3]])


def test_flash_padding_mask_and_window():
    mask = torch.ones(SAMPLES, KEYS, dtype=torch.long)
    mask[1, :2] = 0
    call = call_with(mask, "flash_attention_2", sliding_window=6)
    assert_row(call, [6, 6], [[1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6]])
    right = torch.ones(SAMPLES, KEYS, dtype=torch.long)
    right[1, 5:] = 0
    assert_row(call_with(right, "flash_attention_2"), [6, 4], [list(range(7)), list(range(5))])


def test_window_option_is_flash_only():
    """Other backends get the window inside the mask; theirs is None when nothing is cut."""
    assert_row(call_with(sliding_window=3), [6, 6], everything)


def test_position_bias_is_added():
    bias = torch.zeros(1, 1, 1, KEYS)
    bias[..., 2] = float("-inf")
    allowed = [[0, 1, 3, 4, 5, 6]] * SAMPLES
    call = call_with(position_bias=bias.expand(1, 1, KEYS, KEYS))
    assert_row(call, [6, 6], allowed)


def test_trimmed_queries():
    """Some models compute the last query alone; its place is then 0."""
    call = call_with(queries=1)
    got = row(call, torch.tensor([6, 6]))
    assert torch.allclose(got, naive(call, [0, 0], everything), atol=1e-6)
    with pytest.raises(ModelError, match="use left padding"):
        row(call, torch.tensor([6, 4]))


def test_low_precision_is_computed_in_float32():
    call = call_with()
    exact = row(call, torch.tensor([6, 6]))
    call.query, call.key = call.query.bfloat16(), call.key.bfloat16()
    rounded = row(call, torch.tensor([6, 6]))
    assert rounded.dtype == torch.float32
    call.query, call.key = call.query.float(), call.key.float()
    assert torch.equal(rounded, row(call, torch.tensor([6, 6]))), "only the inputs are rounded"
    assert torch.allclose(rounded, exact, atol=0.02)


@pytest.mark.parametrize("option", ["sinks", "indices", "block_indices"])
def test_sparse_attention_is_refused(option):
    with pytest.raises(ModelError, match="dense attention"):
        row(call_with(**{option: torch.zeros(1)}), torch.tensor([6, 6]))


def test_unreadable_mask_is_refused():
    with pytest.raises(ModelError, match="sdpa"):
        row(call_with(mask=object(), backend="flex_attention"), torch.tensor([6, 6]))


@pytest.mark.parametrize("mask", ["none", "bool", "flash"])
def test_several_queries_are_as_each_alone(mask):
    made, backend, options = None, "sdpa", {}
    if mask == "bool":
        made = torch.ones(SAMPLES, 1, KEYS, KEYS, dtype=torch.bool).tril()
        made[1, :, :, :2] = False
    elif mask == "flash":
        made, backend = torch.ones(SAMPLES, KEYS, dtype=torch.long), "flash_attention_2"
        options = {"sliding_window": 3, "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    call = call_with(made, backend, **options)
    last = torch.tensor([[2, 4, 6], [3, 5, 5]])
    together = row(call, last)
    assert together.shape == (SAMPLES, 3, HEADS, KEYS)
    for query in range(3):
        alone = row(call, last[:, query])
        assert torch.allclose(together[:, query], alone, atol=1e-6)
    assert not torch.equal(together[:, 0], together[:, 1])
