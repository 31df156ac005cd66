"""What was run on what: the record every result carries."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from gazeguard._version import __version__
from gazeguard.models.fingerprint import fingerprint

if TYPE_CHECKING:
    from gazeguard.data.dataset import Dataset
    from gazeguard.models.target import Target

# The packages whose version can change a number.
PACKAGES = (
    "numpy",
    "peft",
    "pillow",
    "pyarrow",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
)


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of the installed ones among `names`."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """When and with which software, as JSON types."""
    return {
        "gazeguard": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "packages": package_versions(),
    }


def attention_backend(target: Target) -> str:
    """The attention kernel of the watched decoder, e.g. `sdpa`."""
    return str(getattr(target.decoder.config, "_attn_implementation", "unknown"))


def provenance(
    target: Target,
    dataset: Dataset | None,
    *,
    arguments: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """The record of one run, as JSON types.

    Args:
        target: the model that was watched.
        dataset: the data it was shown, or None when it was not a data set.
        arguments: options of the run by name, as they took effect.
        seed: of every random choice.
    """
    return {
        **environment(),
        "model": fingerprint(target),
        "data": None if dataset is None else _data(dataset),
        "device": _device_name(target),
        "dtype": str(target.base.dtype).removeprefix("torch."),
        "attention": attention_backend(target),
        "seed": seed,
        "arguments": plain_arguments(arguments),
    }


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run by name, as JSON types."""
    return {name: _plain(value) for name, value in arguments.items()}


def _data(dataset: Dataset) -> dict[str, Any]:
    return {
        "path": str(dataset.path),
        "format": dataset.format,
        "rows": dataset.count(),
        "fingerprint": dataset.fingerprint(),
    }


def _device_name(target: Target) -> str:
    import torch

    from gazeguard.models.offload import places

    device = target.device
    name = f"{device}"
    if device.type == "cuda":
        name += f" ({torch.cuda.get_device_name(device)})"
    kept = places(target.base)
    return f"{name}, model spread over {', '.join(kept)}" if kept else name


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
