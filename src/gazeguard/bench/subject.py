"""What defences are given of a made model, at the three levels; the truth stays outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gazeguard.bench.defences.activations import last_states
from gazeguard.cleaning import CleanOutcome, clean
from gazeguard.guarding.answer import answer
from gazeguard.guarding.guard import Guard
from gazeguard.guarding.measure import Measured, measure
from gazeguard.guarding.watch import Mode
from gazeguard.lab.poison import samples, write_set
from gazeguard.lab.rows import Row
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.types import Profile, Sample

MAX_NEW_TOKENS, BATCH = 60, 50


@dataclass
class Tuned:
    """A base with somebody's adapter on it, loaded when it is first needed (float32)."""

    base: Path
    adapter: Path
    seed: int

    @cached_property
    def target(self) -> Target:
        """The tuned model."""
        return load(self.base, self.adapter, dtype="float32")


@dataclass
class _OfTuned:
    """What is about one tuned model."""

    tuned: Tuned

    @property
    def target(self) -> Target:
        """The tuned model."""
        return self.tuned.target

    @property
    def seed(self) -> int:
        """For defences that draw."""
        return self.tuned.seed


@dataclass
class Upload(_OfTuned):
    """A fine-tuning set, as somebody who fine-tuned on it sees it.

    Attributes:
        tuned: the model that was fine-tuned on it.
        rows: pictures, questions and answers; `is_poison` is wiped.
        work: a folder for this upload's files.
    """

    rows: list[Row]
    work: Path

    def __post_init__(self) -> None:
        self.rows = [replace(row, is_poison=False, kind="unknown") for row in self.rows]

    @cached_property
    def samples(self) -> list[Sample]:
        """Pictures and questions, ready for `target.encode`."""
        return samples(self.rows)

    @cached_property
    def cleaned(self) -> CleanOutcome:
        """`gazeguard clean` as a user runs it, once for all rules that read its profile."""
        return clean(
            self.tuned.base,
            write_set(self.rows, self.work / "set"),
            self.work / "cleaned",
            adapter=self.tuned.adapter,
            batch_size=BATCH,
            block_rows=500,
            dtype="float32",
        )

    @property
    def profile(self) -> Profile:
        """Attention signals of every row, in the rows' order."""
        return self.cleaned.profile

    @cached_property
    def activations(self) -> NDArray[np.float32]:
        """Last hidden state of every row before its answer, `(n, hidden)`."""
        return last_states(self.target, self.samples, BATCH)


@dataclass
class Traffic(_OfTuned):
    """Requests to a running model. A defence treats each alone: their order tells nothing.

    Attributes:
        tuned: the model that answers.
        known: clean requests that the defender may calibrate on.
        asked: the requests.
    """

    known: list[Sample]
    asked: list[Sample]

    @cached_property
    def known_ratios(self) -> Measured:
        """What a guard measures of the known requests, all layers."""
        return self._measured(self.known)

    @cached_property
    def asked_ratios(self) -> Measured:
        """The same of the requests."""
        return self._measured(self.asked)

    @cached_property
    def watcher(self) -> Guard:
        """A guard that only looks on: what `answers` runs under, so that all runs compare."""
        known = replace(self.known_ratios, divergence=None)
        return Guard.fit(self.target, known, alpha=0.05, seed=self.seed)

    @cached_property
    def plain(self) -> list[str]:
        """What the model answers without any defence."""
        return self.answers(self.asked)

    def answers(
        self, requests: Sequence[Sample], guard: Guard | None = None, mode: Mode = "purify"
    ) -> list[str]:
        """Greedy answers in batches; under `guard`, or as the model gives them."""
        given: list[str] = []
        for start in range(0, len(requests), BATCH):
            found = answer(
                guard or self.watcher,
                requests[start : start + BATCH],
                mode=mode if guard else "detect",
                max_new_tokens=MAX_NEW_TOKENS,
                compare=False,
            )
            given += [str(each.answer) for each in found]
        return given

    def _measured(self, requests: Sequence[Sample]) -> Measured:
        target, earlier = self.target, self.target.adapter is not None
        return measure(target, requests, layers=target.layers, batch_size=BATCH, earlier=earlier)


@dataclass(frozen=True)
class Responses:
    """What a defence made of the requests, in their order.

    Attributes:
        answers: final ones; None where the request was refused.
        score: float `(n,)`, higher = more suspicious; None for a defence that does not judge.
        flagged: bool `(n,)`, by the defence's own threshold; None for one that does not judge.
    """

    answers: list[str | None]
    score: NDArray[np.float64] | None = None
    flagged: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Suspect:
    """A model of unknown origin.

    Attributes:
        model: its folder, an adapter for a vision-language model.
        base: the clean model that it was made from.
        references: known-clean fine-tunes of the base, the suspect never among them.
        work: a folder shared by all suspects of a run, for what can be computed once.
        seed: for defences that draw.
    """

    model: Path
    base: Path
    references: tuple[Path, ...]
    work: Path
    seed: int


@dataclass(frozen=True)
class Judged:
    """What a scan says of a suspect.

    Attributes:
        outcome: `clean`, `flagged` or `inconclusive`.
        score: higher = more suspicious; None when nothing could be measured.
    """

    outcome: str
    score: float | None
