"""Find, clean and disarm backdoors in vision-language models by watching where they look.

Names are loaded on first use, so importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gazeguard._version import __version__

if TYPE_CHECKING:
    from gazeguard.cleaning import clean
    from gazeguard.guarding import Guard
    from gazeguard.methods.bye import BYE
    from gazeguard.models.load import load

_HOME = {
    "BYE": "gazeguard.methods.bye",
    "Guard": "gazeguard.guarding",
    "clean": "gazeguard.cleaning",
    "load": "gazeguard.models.load",
}

__all__ = ["BYE", "Guard", "__version__", "clean", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gazeguard' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
