"""Guarding a running model: calibrate once, then judge and disarm inside its own forward pass."""

from gazeguard.guarding.guard import Guard
from gazeguard.guarding.verdict import GuardVerdict

__all__ = ["Guard", "GuardVerdict"]
