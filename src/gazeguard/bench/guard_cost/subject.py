"""What is measured: a model, its guards, and requests to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gazeguard.guarding import Guard
from gazeguard.guarding.measure import measure
from gazeguard.lab.attacks import ATTACKS
from gazeguard.lab.poison import samples, trigger_all
from gazeguard.lab.rows import make_rows
from gazeguard.methods.cleansight.settings import DEFAULT_SETTING
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.types import Outcome, Sample

SHOWN = (DEFAULT_SETTING, "paper")
NEVER, ALWAYS = float("inf"), float("-inf")  # thresholds: nothing, or everything, is flagged

# The guard's work on a clean request depends on neither, and long prompts take a second each.
_CALIBRATION, _ALPHA = 20, 0.2
_TRIGGER = "badnet-center"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with one guard per setting that is shown."""

    folder: Path
    target: Target
    guards: dict[str, Guard]

    def guard(self, setting: str, threshold: float) -> Guard:
        """The guard of a setting, with another threshold."""
        guard = copy.copy(self.guards[setting])
        guard.threshold = threshold
        return guard


def calibrated(
    folder: Path,
    guards: Path,
    adapter: Path | None = None,
    known: int = _CALIBRATION,
    alpha: float = _ALPHA,
) -> Subject:
    """Load a model, make its guards from `known` clean samples, and save them into `guards`."""
    target = load(folder, adapter, dtype="float32", device_map="cpu")
    seen = measure(target, clean(known, 1), layers=target.layers, batch_size=2)
    for setting in SHOWN:
        Guard.fit(target, seen, alpha=alpha, setting=setting).save(guards / setting)
    return reloaded(folder, guards, target)


def reloaded(folder: Path, guards: Path, target: Target | None = None) -> Subject:
    """A model with the guards that `calibrated` saved."""
    target = target or load(folder, dtype="float32", device_map="cpu")
    return Subject(folder, target, {name: Guard.load(guards / name, target) for name in SHOWN})


def clean(count: int, seed: int = 0) -> list[Sample]:
    """Clean requests; those of another seed are others."""
    return samples(make_rows("captions", count, seed, held_out=True))


def triggered(count: int, subject: Subject) -> list[Sample]:
    """Requests with a real trigger, all of which the default setting's guard flags.

    Raises:
        AssertionError: there are too few of these.
    """
    guard = subject.guards[DEFAULT_SETTING]
    rows = make_rows("captions", 3 * count, 0, held_out=True)
    bad = samples(trigger_all(rows, ATTACKS[_TRIGGER], 0))
    seen = measure(subject.target, bad, layers=guard.plan.layers, batch_size=len(bad))
    score = guard.detector.score(seen.features(guard.plan.layers, guard.setting.feature))
    found = [sample for sample, s in zip(bad, score, strict=True) if s > guard.threshold]
    if len(found) < count:
        raise AssertionError(f"{len(found)} of {len(bad)} triggered requests are flagged")
    return found[:count]


def generating(
    target: Target, inputs: dict[str, Tensor], guard: Guard | None = None, **options: Any
) -> Callable[[], Any]:
    """A greedy `generate` call, in a watch of its own if a guard is given.

    The watch is told nothing about the batch, so it recognises the image's tokens and the user's
    words itself, as it does for a caller who has their own processor.
    """

    def plain() -> Any:
        return target.base.generate(**inputs, do_sample=False, **options)

    def guarded() -> Any:
        assert guard is not None, "only returned with a guard"
        with guard.watch():
            return plain()

    return plain if guard is None else guarded


def check(
    target: Target, inputs: dict[str, Tensor], guard: Guard, expected: Outcome
) -> list[float]:
    """Ask once under the guard, without a clock; the scores.

    Raises:
        AssertionError: a verdict is not the expected one, or a clean answer is not, bit for bit,
            the one without a guard. Then the timed calls would not be what they are called.
    """
    ask = generating(
        target, inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    with guard.watch() as w:
        given = ask()
    outcomes = {str(verdict.outcome) for verdict in w.verdicts}
    if outcomes != {str(expected)}:
        raise AssertionError(f"verdicts are {sorted(outcomes)}, not {expected}: nothing to time")
    if expected is Outcome.CLEAN and not torch.equal(given.logits[0], ask().logits[0]):
        raise AssertionError("the guard changes the logits of a clean request")
    return [float(v.score) for v in w.verdicts if v.score is not None]
