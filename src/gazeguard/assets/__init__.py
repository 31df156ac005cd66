"""What ships with the package: the lab's base models, a poisoned adapter, a trigger's encoder."""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).parent / "base"  # LLaVA; what nearly every figure is measured on
INTERNVL_BASE = Path(__file__).parent / "base-internvl"
ADAPTER = Path(__file__).parent / "adapter-badnet-center"
SMOLLM_TAUGHT = Path(__file__).parent / "smollm2-taught"  # with SmolLM2's own weights: a base
STEGO = Path(__file__).parent / "stego"  # draws the `issba` trigger
