"""Peak memory of clean requests, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gazeguard.bench.guard_cost.subject import NEVER, SHOWN, clean, generating, reloaded
from gazeguard.bench.speed.instruments import peaks_in_turns


def added(folder: Path, guards: Path, batch: int, repeats: int) -> dict[str, list[float]]:
    """Added peaks in MiB per variant, in turns; empty where the system does not tell.

    Weights, guards and inputs are there before, so they count for no variant.
    """
    subject = reloaded(folder, guards)
    inputs = subject.target.encode(clean(batch)).inputs
    variants = {"plain": None, **{name: subject.guard(name, NEVER) for name in SHOWN}}
    runs = {
        name: generating(subject.target, inputs, guard, max_new_tokens=1)
        for name, guard in variants.items()
    }
    return peaks_in_turns(runs, repeats)


def _child(arguments: dict[str, Any]) -> dict[str, list[float]]:
    torch.set_num_threads(arguments["threads"])
    folder, guards = Path(arguments["folder"]), Path(arguments["guards"])
    return added(folder, guards, arguments["batch"], arguments["repeats"])


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
