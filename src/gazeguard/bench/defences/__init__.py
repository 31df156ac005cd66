"""Every defence of the benchmark, ours and baselines; importing a module registers its own."""

from gazeguard.bench.defences import (
    bye,
    cleaning,
    cleansight,
    masking,
    purify,
    scanning,
    sentinet,
)
from gazeguard.bench.defences.registry import DEFENCES, Defence, defence

__all__ = [
    "DEFENCES",
    "Defence",
    "bye",
    "cleaning",
    "cleansight",
    "defence",
    "masking",
    "purify",
    "scanning",
    "sentinet",
]
