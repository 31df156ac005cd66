"""Where a model runs."""

from __future__ import annotations

import torch

from gazeguard.errors import UsageError


def chosen_device(device: str) -> tuple[str, str]:
    """What transformers calls the device, and why it was chosen.

    Args:
        device: `auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:1`, `mps`, or `balanced`
            over all GPUs, where layers that do not fit stay in main memory and, past that, on disk.

    Raises:
        UsageError: it is not there, or no device at all.
    """
    if device != "auto":
        kind, colon, number = device.partition(":")
        if kind not in ("cpu", "cuda", "mps", "balanced") or (
            colon and not (kind == "cuda" and number.isdecimal())
        ):
            raise UsageError(
                f"Device '{device}' is unknown: use auto, cpu, cuda, cuda:<n>, mps or balanced."
            )
        if kind == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"There is no usable GPU for device '{device}': use --device cpu.")
        if number and int(number) >= torch.cuda.device_count():
            raise UsageError(
                f"There is no GPU for device '{device}': use cuda:0 to"
                f" cuda:{torch.cuda.device_count() - 1}, or balanced for all of them."
            )
        if kind == "mps" and not torch.backends.mps.is_available():
            raise UsageError("There is no Apple GPU for device 'mps': use --device cpu.")
        return device, "as asked"
    if torch.cuda.is_available():
        return "cuda:0", "the first GPU"
    if torch.backends.mps.is_available():
        return "mps", "the Apple GPU"
    return "cpu", "no GPU was found"
