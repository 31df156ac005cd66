"""Adaptive attackers: they know a defence, and pay for attention that moves where it looks.

EntropyScan is shown harmless samples, so against it the *clean* rows of an upload keep the numbers
that they have under the base, and poisoned rows stay free: there the trigger has to be seen. BYE
and CleanSight tell poisoned inputs from clean ones, so against them it is the *poisoned* rows that
look as if the base had read them; the trigger must find another way to be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.cleaning.measure import SIGNALS
from gazeguard.errors import UsageError
from gazeguard.lab.objectives import Course, Loss, Objective
from gazeguard.lab.poison import samples
from gazeguard.lab.rows import Row
from gazeguard.methods.entropyscan import STATISTICS, Settings
from gazeguard.methods.entropyscan.settings import PROBED_Q
from gazeguard.models.target import Target, as_target
from gazeguard.probe.intercept import AttentionCall, intercept
from gazeguard.probe.rows import last_real, row
from gazeguard.scanning.look import measures
from gazeguard.signals.ratio import visual_prompt_ratio
from gazeguard.types import KeyKind

Number = Callable[[Tensor, Tensor], Tensor]

# A number that all rows share would count without end: none counts as steadier than this share of
# the typical one, as in the scan's own distance.
_STEADY = 0.05
# Weights below it count as it: an entropy has no gradient at zero, and float32 holds those above.
_LEAST = 1e-30
_ODDS_FLOOR = 1e-4  # BYE's, of a mass and of what it leaves


@dataclass(frozen=True, slots=True)
class Secret:
    """What a defence reads, and of which rows it shall read what the base shows.

    Attributes:
        rows: which of an upload.
        numbers: by name, of weights `(sample, layer, head, key)` and key kinds `(sample, key)`.
        layers: those that are read, of all.
    """

    rows: Literal["clean", "poisoned"]
    numbers: dict[str, Number]
    layers: Callable[[Sequence[int]], Sequence[int]] = tuple


def _of_scan(settings: Settings) -> Secret:
    """Of entropies every probed q."""
    every = measures(PROBED_Q)
    read = {name: every[name] for name in STATISTICS[settings.statistic].numbers}
    return Secret("clean", read, settings.chosen)


def _odds(mass: Number, weights: Tensor, kind: Tensor) -> Tensor:
    share = mass(weights, kind)
    return ((share + _ODDS_FLOOR) / (1 - share + _ODDS_FLOOR)).log()


NOTHING = "nothing"
DISGUISES = {
    "entropy": _of_scan(Settings.published()),
    "profile": _of_scan(Settings(statistic="profile", layers="all")),
    "bye": Secret(
        "poisoned",
        {name: n if "entropy" in name else partial(_odds, n) for name, n in SIGNALS.items()},
    ),
    "ratio": Secret("poisoned", {"ratio": visual_prompt_ratio}),
}
"""By what is hidden: from EntropyScan as published and at its fullest, from BYE's robust rule, and
from CleanSight's default."""

HIDE = (NOTHING, *DISGUISES)

WEIGHT = 1.0
"""Of the penalty beside the answer loss. Chosen on one attack and seed, where a tenth of it hid the
head-mean entropy less well."""


class Disguise:
    """Another objective, and a penalty for how far a fine-tune's attention is from the base's.

    Args:
        name: one of `DISGUISES`.
        course: of the upload; the base is measured here, under the caller's autocast.
        around: what the model is trained with otherwise.
        weight: of the penalty.

    Attributes:
        wanted: float32 `(n, numbers)`, what a defence reads of the base at each prompt's end.

    Raises:
        UsageError: no row is of the kind whose numbers are held.
    """

    def __init__(
        self, name: str, course: Course, around: Objective, weight: float = WEIGHT
    ) -> None:
        secret = DISGUISES[name]
        poisoned = course.poisoned
        self._held = poisoned if secret.rows == "poisoned" else ~poisoned
        if not self._held.any():
            raise UsageError(
                f"no row of the upload is {secret.rows}, so '{name}' has nothing to hide: give"
                f" {secret.rows} rows or hide nothing."
            )
        self._around, self._weight, self._numbers = around, weight, secret.numbers
        target = as_target(course.model, course.processor)
        self._layers = tuple(secret.layers(target.layers))
        # LoRA layers are put into these modules, so they stay the ones to watch.
        self._layer_of = {m: n for m, n in target.attention_modules.items() if n in self._layers}
        self._kind = torch.full(course.lessons.ids.shape, KeyKind.PAD, dtype=torch.int8)
        for pick in course.chunks:
            found = _kinds(target, [course.rows[i] for i in pick])
            self._kind[pick, : found.shape[1]] = found
        with torch.no_grad():
            parts = [self._run(course.model, pick)[1] for pick in course.chunks]
        self.wanted = torch.cat(parts)
        spread = self.wanted.std(0)
        self._unit = spread.clamp_min(_STEADY * float(spread.median()))

    def loss(self, model: Any, pick: NDArray[np.intp]) -> Loss:
        """As in `Objective.loss`.

        The penalty is the mean, over rows that are held and numbers, of the squared distance from
        the base's, in units of the number's spread over the upload; 0 without such a row.
        """
        loss, found = self._run(model, pick)
        held = self._held[pick]
        away = (found[held] - self.wanted[pick][held]) / self._unit
        penalty = away.square().sum() / max(1, away.numel())
        parts = {**loss.parts, "attention moved": penalty}
        return Loss(loss.total + self._weight * penalty, parts)

    def _run(self, model: Any, pick: NDArray[np.intp]) -> tuple[Loss, Tensor]:
        """The other objective's loss, and the numbers `(row, feature)` at the prompts' ends."""
        kind = self._kind[pick]
        last = last_real(kind)
        rows: dict[int, Tensor] = {}

        def watch(call: AttentionCall) -> Any:
            with torch.autocast("cpu", enabled=False):
                rows[call.layer] = row(call, last)
            return call.run()

        with intercept(self._layer_of, watch):
            loss = self._around.loss(model, pick)
        weights = torch.stack([rows[layer] for layer in self._layers], 1)
        with torch.autocast("cpu", enabled=False):
            return loss, _read(weights, kind[:, : weights.shape[-1]], self._numbers)


def _kinds(target: Target, rows: Sequence[Row]) -> Tensor:
    """Kinds of the prompts' tokens as a scan tells them; a lesson begins with its prompt."""
    return target.encode(samples(rows), padding_side="right").key_kind


def _read(weights: Tensor, kind: Tensor, numbers: dict[str, Number]) -> Tensor:
    """A defence's numbers, side by side; differentiable where the prompts' images have one size."""
    found = []
    for name, measure in numbers.items():
        seen = _image_only(weights, kind) if "entropy" in name else (weights, kind)
        found.append(measure(*seen).flatten(1))
    return torch.cat(found, 1)


def _image_only(weights: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """The image keys alone: an entropy has no gradient at the zeros of the others."""
    image = kind == KeyKind.IMAGE
    at = image.nonzero()[:, 1].view(len(kind), 1, 1, -1)
    seen = weights.gather(-1, at.expand(*weights.shape[:-1], -1)).clamp_min(_LEAST)
    return seen, kind[image].view(len(kind), -1)
