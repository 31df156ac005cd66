"""The measurements: what a request waits for with the guard and without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers as hf
from scipy.stats import quantile_test

from gazeguard.bench.guard_cost import memory
from gazeguard.bench.guard_cost.subject import NEVER, SHOWN, Subject, check, clean, generating
from gazeguard.bench.speed.instruments import (
    Figure,
    Part,
    Seconds,
    Spread,
    in_child,
    interleave,
    public_maps,
    ratio,
)
from gazeguard.guarding import Guard
from gazeguard.methods.cleansight.settings import DEFAULT_SETTING
from gazeguard.signals.ratio import visual_prompt_ratio
from gazeguard.types import Outcome, Sample

FIRST, STEP, MEMORY, PUBLIC = 1.05, 1.02, 1.02, 3.0  # targets
_SCORE_TOLERANCE = 1e-3  # relative


@dataclass(frozen=True, slots=True)
class Effort:
    """How often to measure one model.

    Attributes:
        first: repeats for the time to first token.
        step: repeats for the decoding step.
        memory: repeats for the peak memory.
        flagged: repeats with flagged requests.
        public: repeats with the public way; 0 leaves it out.
        steps: decoding steps of one repeat.
        batch: requests at once for memory and when flagged. A short prompt alone needs less memory
            than the noise of measuring it.
    """

    first: int = 1
    step: int = 1
    memory: int = 3
    flagged: int = 1
    public: int = 0
    steps: int = 32
    batch: int = 1


class Clock:
    """A streamer that notes when `generate` hands over the prompt and then each token."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, tokens: object) -> None:
        """Called by `generate`, first with the prompt."""
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate` after the last token."""


def step_seconds(marks: Sequence[float]) -> float:
    """Median seconds between tokens: from the marks of prompt, first token, second token ..."""
    return median(b - a for a, b in pairwise(marks[1:]))


def paired(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Median ratio of neighbours in time; low and high are the 95 % interval of that median.

    The interval comes from order statistics, which assumes nothing about the noise. It takes at
    least six pairs; fewer give their range.
    """
    found = ratio(above, below)
    each = [a / b for a, b in zip(above, below, strict=True)]
    interval = quantile_test(each, p=0.5).confidence_interval(0.95)
    low, high = float(interval.low), float(interval.high)
    if not (isfinite(low) and isfinite(high)):
        return found
    return Spread(found.median, low, high, found.n)


def clean_traffic(subject: Subject, guards: Path, effort: Effort, threads: int) -> Part:
    """Time to first token and decoding step of one clean request, peak memory of a batch."""
    target = subject.target
    inputs = target.encode(clean(1)).inputs
    calm = {name: subject.guard(name, NEVER) for name in SHOWN}
    for guard in calm.values():
        check(target, inputs, guard, Outcome.CLEAN)
    variants = {"plain": None, **calm}
    first = interleave(
        {
            name: generating(target, inputs, guard, max_new_tokens=1)
            for name, guard in variants.items()
        },
        effort.first,
    )
    step: Seconds = {name: [] for name in variants}
    length = effort.steps + 1

    def steps(name: str) -> None:
        clock = Clock()
        options = {"max_new_tokens": length, "min_new_tokens": length, "streamer": clock}
        generating(target, inputs, variants[name], **options)()
        step[name].append(step_seconds(clock.marks))

    interleave({name: partial(steps, name) for name in variants}, effort.step)
    step = {name: seconds[1:] for name, seconds in step.items()}  # after the warm-up
    arguments = {
        "folder": str(subject.folder),
        "guards": str(guards),
        "batch": effort.batch,
        "repeats": effort.memory,
        "threads": threads,
    }
    peaks = in_child(memory.__name__, arguments, threads)

    of = f"{inputs['input_ids'].shape[1]:,} tokens"
    figures = [
        Figure(f"plain, {of}: time to first token", "s", Spread.of(first["plain"])),
        Figure(f"plain, {of}: decoding step", "s", Spread.of(step["plain"])),
    ]
    for name in SHOWN:
        what = f"guard ({name}) / plain, {of}"
        figures += [
            Figure(f"{what}: {kind}", "x", _over(seconds, name), at_most=bound)
            for kind, seconds, bound in (
                ("time to first token", first, FIRST),
                ("decoding step", step, STEP),
                (f"added peak memory, batch {effort.batch}", peaks, MEMORY),
            )
        ]
    return figures, {"first_token_seconds": first, "step_seconds": step, "added_peak_MiB": peaks}


def public_way(subject: Subject, effort: Effort) -> Part:
    """Whole maps out of `generate`, last rows picked in Python, beside the guarded prefill.

    Raises:
        AssertionError: the two do not give the same score.
    """
    encoded = subject.target.encode(clean(1))
    inputs, guard = encoded.inputs, subject.guard(DEFAULT_SETTING, NEVER)
    layers, log = list(guard.plan.layers), guard.setting.feature == "log-ratio"
    model = hf.AutoModelForImageTextToText.from_pretrained(
        subject.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def public() -> float:
        maps = public_maps(model, inputs)
        rows = torch.stack([maps[layer][:, :, -1] for layer in layers], 1)
        features = visual_prompt_ratio(rows, encoded.key_kind, log=log)
        return float(guard.detector.score(features.numpy())[0])

    (score,) = check(subject.target, inputs, guard, Outcome.CLEAN)
    other = public()
    if not np.isclose(score, other, rtol=_SCORE_TOLERANCE, atol=0):
        raise AssertionError(f"the two ways score {score:.6g} and {other:.6g}")
    ours = generating(subject.target, inputs, guard, max_new_tokens=1)
    seconds = interleave({"public": public, "guarded": ours}, effort.public)
    tokens = inputs["input_ids"].shape[1]
    name = f"eager + output_attentions / guard ({DEFAULT_SETTING}), {tokens:,} tokens: prefill"
    figure = Figure(name, "x", paired(seconds["public"], seconds["guarded"]), at_least=PUBLIC)
    return [figure], {"seconds": seconds, "scores": {"public": other, "guarded": score}}


def flagged(
    subject: Subject, asked: Sequence[Sample], guard: Guard, repeats: int, kind: str
) -> Part:
    """Prefill of a batch of requests that the guard flags, all of them, and disarms.

    Args:
        subject: the model.
        asked: the requests.
        guard: flags them, by its threshold or because they carry a trigger.
        repeats: how often to measure.
        kind: of the requests, in words.
    """
    target, inputs = subject.target, subject.target.encode(asked).inputs
    passes: list[None] = []
    counting = target.decoder.register_forward_hook(lambda *_: passes.append(None))
    check(target, inputs, guard, Outcome.FLAGGED)
    counting.remove()
    runs = {
        name: generating(target, inputs, each, max_new_tokens=1)
        for name, each in (("plain", None), ("flagged", guard))
    }
    seconds = interleave(runs, repeats)
    tokens = inputs["input_ids"].shape[1]
    what = f"{kind} / plain, {tokens:,} tokens, batch {len(asked)}"
    name = f"{what}: time to first token ({len(passes)} passes)"
    figure = Figure(name, "x", paired(seconds["flagged"], seconds["plain"]))
    return [figure], {"seconds": seconds, "passes": len(passes)}


def _over(found: Seconds, name: str) -> Spread | None:
    """A variant over the plain one; None where either could not be measured."""
    return paired(found[name], found["plain"]) if found[name] and found["plain"] else None
