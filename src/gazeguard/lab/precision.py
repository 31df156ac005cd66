"""What the lab computes in: bfloat16 where the CPU has instructions for it, else float32."""

from __future__ import annotations

import torch


def native_bfloat16() -> bool:
    """Whether torch's CPU library computes in bfloat16 itself.

    A CPU without AVX-512 emulates it: a fine-tune then takes several times as long as in float32.
    """
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast() -> torch.autocast:
    """The context of every forward pass of the lab."""
    return torch.autocast("cpu", torch.bfloat16, enabled=native_bfloat16())
