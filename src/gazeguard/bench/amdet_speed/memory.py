"""Peak memory of a scan beside that of one training step, in a process of its own."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from gazeguard.bench.amdet_speed.subject import Pair, Shape, random_pair
from gazeguard.bench.speed.instruments import peaks_in_turns
from gazeguard.data.prompts import built_in
from gazeguard.lab.text.train import trainable
from gazeguard.methods.amdet import Settings, scan_encoder
from gazeguard.methods.amdet.inversion import invert

STEPS = ("one step of the search", "one step of AdamW on all weights")
_SCAN = Settings(prompts=160, steps=1, points=6)  # everything at its full batch, but briefly


def added(pair: Pair, repeats: int) -> dict[str, list[float]]:
    """Added peaks in MiB, in turns; empty where the system does not tell.

    All weights are there before and count for nothing. Both steps take as many prompts as a step of
    the scan does with all its restarts.
    """
    suspect, anchor = pair.suspect, pair.anchor
    prompts = built_in(_SCAN.prompts)
    slotted, plain = (suspect.tokenise(prompts, slot=slot) for slot in (True, False))
    rows = _SCAN.batch * _SCAN.restarts

    def scan() -> None:
        scan_encoder(suspect, anchor, prompts, _SCAN)

    def search() -> None:
        one = Settings(steps=1)
        invert(suspect, anchor, slotted[: one.batch], plain[: one.batch], one)

    def train() -> None:
        weights = trainable(suspect)
        optimiser = torch.optim.AdamW(weights, lr=1e-6)
        suspect.run(plain[:rows]).pooled.square().mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)

    runs = {"scan": scan, STEPS[0]: search, STEPS[1]: train}
    return peaks_in_turns(runs, repeats)


def _child(arguments: dict[str, Any]) -> dict[str, list[float]]:
    torch.set_num_threads(arguments["threads"])
    return added(random_pair(Shape(*arguments["shape"])), arguments["repeats"])


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
