"""What ships with the package: the lab's base model and one poisoned adapter."""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).parent / "base"
ADAPTER = Path(__file__).parent / "adapter-badnet-center"
