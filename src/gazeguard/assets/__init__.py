"""What ships with the package: the lab's base models and one poisoned adapter."""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).parent / "base"  # LLaVA; what nearly every figure is measured on
INTERNVL_BASE = Path(__file__).parent / "base-internvl"
ADAPTER = Path(__file__).parent / "adapter-badnet-center"
