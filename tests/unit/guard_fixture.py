"""Invented guarded runs with pictures, for the tests of their reports."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gazeguard.guarding import Guard, GuardVerdict
from gazeguard.guarding.answer import Guarded
from gazeguard.guarding.saved import Saved
from gazeguard.methods.cleansight.settings import SETTINGS, Plan
from gazeguard.report.guard import GuardReport, Recorder
from gazeguard.types import ImagePart, Sample, SkippedRow, TextPart, Turn
from tests.unit.report_fixture import scene

PROVENANCE = {"gazeguard": "0.1.0", "model": {"id": "ab" * 32}, "seed": 0}
CALIBRATION = np.sort(np.random.default_rng(1).gamma(30.0, 0.18, 199))


def make_guard(calibration: np.ndarray = CALIBRATION) -> Guard:
    """A guard without a model; it can judge scores."""
    arrays = {
        "mean": np.zeros(2),
        "whitener": np.ones(2),
        "calibration": calibration,
        "levels": np.ones((1, 2)),
    }
    counts = {"fit": 100, "threshold": len(calibration), "left_out": 0}
    saved = Saved(SETTINGS["all"], Plan((0,), (0,), 0), arrays, 0.01, 0, counts, {"id": "ab" * 32})
    return Guard(cast(Any, None), saved)


def asked(
    row: int, prompt: str = "What is on the left?", *, triggered: bool = False, images: int = 1
) -> Sample:
    """A request with pictures, the same at every call; the first may be triggered."""
    turns = (Turn("user", (*map(ImagePart, range(images)), TextPart(prompt))),)
    name = hashlib.sha256(f"{row} {prompt}".encode()).hexdigest()
    pictures = (scene(row + 1000 * i, triggered=triggered and not i) for i in range(images))
    return Sample(row, name, tuple(pictures), turns)


def alarm(
    verdict: GuardVerdict,
    *,
    hidden: bool = True,
    grid: tuple[int, ...] = (8, 8),
    whole: bool = False,
) -> GuardVerdict:
    """A flagged verdict with its tokens; heat sits in the middle."""
    heat, tokens = np.full(grid, 0.2, np.float32), np.full(grid, whole)
    middle = tuple(side // 2 for side in grid)
    heat[middle], tokens[middle] = 4.0, True
    return replace(verdict, tokens=(tokens,), heat=(heat,), hidden=hidden)


class Run:
    """A recorder that was fed, and the samples to read again."""

    def __init__(self, mode: str = "purify", guard: Guard | None = None) -> None:
        self.guard, self.mode = guard or make_guard(), mode
        self.recorder = Recorder(self.guard, mode)
        self.samples: dict[int, Callable[[], Sample]] = {}
        self._row = 0

    def judged(
        self,
        score: float,
        prompt: str = "What is on the left?",
        images: int = 1,
        more: tuple[NDArray[np.bool_], ...] = (),
        **drawn: Any,
    ) -> Sample:
        """One more request with this score.

        Args:
            score: decides whether it is flagged.
            prompt: the user's words.
            images: how many it has.
            more: tokens of the images after the first; their heat is 1 there.
            drawn: the first image's, as in `alarm`.
        """
        row, verdict = self._row, self.guard.judge(score)
        flagged = score > self.guard.threshold
        self.samples[row] = lambda: asked(row, prompt, triggered=flagged, images=images)
        sample = self.samples[row]()
        if flagged:
            verdict = alarm(verdict, hidden=self.mode == "purify", **drawn)
            tokens, heat = verdict.tokens or (), verdict.heat or ()
            heat = (*heat, *(one.astype(np.float32) for one in more))
            verdict = replace(verdict, tokens=(*tokens, *more), heat=heat)
        answer = None if flagged and self.mode == "block" else f"answer {row}"
        self.recorder.add(sample, Guarded(answer, verdict))
        self._row += 1
        return sample

    def unread(self, reason: str = "image not found: 'a.png'") -> None:
        """One more row that could not be read."""
        self.recorder.add(SkippedRow(self._row, reason), reason)
        self._row += 1

    def unguarded(self) -> None:
        """One more request that was answered without a verdict."""
        sample = asked(self._row)
        self.samples[self._row] = lambda: sample
        self.recorder.add(sample, Guarded("yes", self.guard.unjudged("numbers are not finite")))
        self._row += 1

    def report(self, *, finished: bool = True, provenance: Any = None) -> GuardReport:
        """What was seen so far."""
        return self.recorder.report(provenance or PROVENANCE, finished=finished)

    def reread(self, wanted: Collection[int]) -> Iterator[Sample]:
        """As a data set does: in input order, one by one."""
        return (make() for row, make in self.samples.items() if row in wanted)


def make_run(
    clean: int = 120,
    flagged: int = 30,
    unread: int = 3,
    mode: str = "purify",
    prompt: str = "What is on the left?",
    far: float = 1.0,
) -> Run:
    """Requests in a mixed order; flagged ones lie up to `far` times three thresholds away."""
    run, rng = Run(mode), np.random.default_rng(2)
    threshold = run.guard.threshold
    calm = np.minimum(rng.gamma(30.0, 0.18, clean), threshold)
    loud = threshold * (1.05 + far * rng.uniform(0.0, 2.0, flagged))
    for score in rng.permutation([*calm, *loud]):
        run.judged(float(score), prompt)
    for _ in range(unread):
        run.unread()
    return run
