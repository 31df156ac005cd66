"""The faster matrix library and the allocator setting: same numbers, and only where they belong."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import nn

from gazeguard.cleaning import heap, linear


@pytest.fixture
def calls(monkeypatch):
    """Make the swap happen on any machine, and count it."""
    real = linear._linear()
    if real is None or not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    found = []

    def counted(*args):
        found.append(args[0].shape)
        return real(*args)

    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(linear, "_linear", lambda: counted)
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_same_products_to_the_last_digits(calls, bias):
    torch.manual_seed(0)
    layer = nn.Linear(96, 200, bias=bias)
    x = torch.randn(7, 30, 96)[:, 1:]  # not contiguous
    with torch.inference_mode():
        expected = layer(x)
        with linear.fast_linear():
            found = layer(x)
    assert calls == [x.shape]
    assert (found - expected).abs().max() < 1e-5


def test_nan_and_infinity_pass_through(calls):
    layer = nn.Linear(8, 3)
    x = torch.randn(20, 8)
    x[2, 1], x[5, 3] = float("nan"), float("inf")
    with torch.inference_mode(), linear.fast_linear():
        found = layer(x)
    assert calls
    assert (~found.isfinite()).any(1).nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize(
    ("rows", "dtype", "grad"),
    [(32, torch.bfloat16, False), (32, torch.float32, True), (4, torch.float32, False)],
    ids=["half precision", "autograd", "few rows"],
)
def test_left_alone(calls, rows, dtype, grad):
    layer = nn.Linear(16, 16, dtype=dtype)
    with torch.set_grad_enabled(grad), linear.fast_linear():
        found = layer(torch.randn(rows, 16, dtype=dtype))
    assert calls == []
    assert found.requires_grad == grad


@pytest.mark.parametrize("vendor", ["GenuineIntel", ""])
def test_only_where_mkl_is_slow(monkeypatch, vendor):
    monkeypatch.setattr(linear, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not linear._mkl_is_slow.__wrapped__()


def test_allocator_is_set_unless_the_user_has(monkeypatch):
    class Library:
        def __init__(self, name):
            self.mallopt = lambda *values: asked.append(values)

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr("os.environ", {"MALLOC_ARENA_MAX": "2"})
    heap.keep_freed_memory()
    assert asked == []
    monkeypatch.setattr("os.environ", {})
    heap.keep_freed_memory()
    assert asked == [(-3, 2**25), (-1, 2**26)]


def test_allocator_without_glibc_is_no_error(monkeypatch):
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap.keep_freed_memory()
