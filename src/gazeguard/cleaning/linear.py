"""Dense layers through oneDNN where PyTorch's own choice of library is the slower one.

On x86, PyTorch multiplies float32 matrices with MKL, and MKL gives AMD processors its AVX2 kernels
even where they have AVX-512: half of what the machine can do. oneDNN, in every build of PyTorch,
has no such rule. Same number format, same products, another order of summation: attention rows
moved by 2e-6 at most where it was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# With fewer rows of input, oneDNN's rearranging of the weights costs more than it brings.
FEWEST_ROWS = 16


@contextmanager
def fast_linear() -> Iterator[None]:
    """Inside the block, this thread's float32 linear layers take the faster of the two libraries.

    It touches no model and changes nothing for half precision, on a GPU, on processors where MKL
    is as fast, under autograd, or for quantised weights.
    """
    if not _mkl_is_slow():
        yield
        return
    with _OneDnn():
        yield


@lru_cache(maxsize=1)
def _mkl_is_slow() -> bool:
    mkl, onednn = torch.backends.mkl, torch.backends.mkldnn
    has = bool(mkl.is_available() and onednn.is_available())  # type: ignore[no-untyped-call]
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has and wide and _linear() is not None and _vendor() == "AuthenticAMD"


@lru_cache(maxsize=1)
def _linear() -> Callable[..., Tensor] | None:
    """The operator behind PyTorch's compiled CPU models; it has no public name."""
    found: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if found is None else found.default


def _vendor() -> str:
    """Who made the processor, in the processor's own words; empty where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("vendor_id")), "")


class _OneDnn(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.linear and not kwargs and _fits(*args):
            x, weight, *bias = args
            linear = _linear()
            assert linear is not None  # `_mkl_is_slow` looked
            return linear(x, weight, bias[0] if bias else None, "none", [], "")
        return func(*args, **(kwargs or {}))


def _fits(x: Any, weight: Any, bias: Any = None) -> bool:
    """Whether the arguments are plain float32 tensors on the CPU, and worth it."""
    return (
        not torch.is_grad_enabled()
        and all(
            type(part) in (Tensor, nn.Parameter)
            and part.dtype == torch.float32
            and part.device.type == "cpu"
            for part in (x, weight, *(() if bias is None else (bias,)))
        )
        and x.ndim > 1
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
    )
