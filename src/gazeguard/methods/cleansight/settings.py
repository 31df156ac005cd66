"""What the guard looks at and what it hides: settings by name, and their form for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gazeguard.errors import UsageError

Feature = Literal["ratio", "log-ratio"]
Distance = Literal["whitened", "ledoit-wolf"]
Layers = Literal["paper", "all", "auto"] | tuple[int, ...]
Prune = str | float

# Rules that look again after hiding; the others decide in the look that judges.
WIDEN, SEARCH = "widen", "search"
LOOKING = (WIDEN, SEARCH)
# Attention weights above which the paper's text (main runs; best balance of its ablation) and the
# public code prune. They hold for the 576 image tokens of LLaVA-1.5.
PUBLISHED_TAU = {"paper": 1e-4, "balanced": 1e-3, "code": 0.02}

# The paper watches 3 of 32 layers from layer 10 on.
_START, _DEPTH, _COUNT = 10, 32, 3


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run CleanSight, for any model.

    Attributes:
        layers: detection layers: `paper` (the paper's relative depth), `all`, `auto` (the steadiest
            ones on clean data, see `auto.py`), or layer numbers.
        feature: attention ratio or its logarithm.
        distance: name of the clean-data distance, see `detector.py`.
        prune: which image tokens are hidden. A number is `tau` in units of the even share `1/T`;
            `paper`, `balanced` and `code` are the published absolute weights; `widen` and `search`
            are ours, see `pruning.py` and `search.py`.
    """

    layers: Layers
    feature: Feature
    distance: Distance
    prune: Prune

    def __post_init__(self) -> None:
        if self.layers not in ("paper", "all", "auto") and isinstance(self.layers, str):
            raise UsageError(
                f"layers '{self.layers}' are not a choice: give paper, all, auto, or layer numbers"
                " such as 6,7,8."
            )
        if self.feature not in get_args(Feature) or self.distance not in get_args(Distance):
            raise UsageError(
                f"'{self.feature}' with '{self.distance}' is not a choice: features are"
                f" {', '.join(get_args(Feature))}; distances are {', '.join(get_args(Distance))}."
            )
        if isinstance(self.prune, str):
            known = self.prune in LOOKING or self.prune in PUBLISHED_TAU
        else:
            known = self.prune > 0
        if not known:
            raise UsageError(
                f"'{self.prune}' does not say which tokens to hide: give"
                f" {', '.join((*LOOKING, *PUBLISHED_TAU))}, or a positive multiple of the even"
                " share 1/T."
            )


SETTINGS: dict[str, Setting] = {
    "paper": Setting("paper", "ratio", "whitened", "paper"),
    "all": Setting("all", "log-ratio", "whitened", WIDEN),
    "mahalanobis": Setting("all", "log-ratio", "ledoit-wolf", SEARCH),
}

DEFAULT_SETTING = "mahalanobis"
"""The one place where the default is chosen."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A setting on one model, in layer numbers.

    Attributes:
        layers: detection layers, ascending; their rows make the feature.
        pick: layers whose rows say which tokens stand out.
        hide_from: first layer in which picked tokens are hidden.
    """

    layers: tuple[int, ...]
    pick: tuple[int, ...]
    hide_from: int

    @property
    def watched(self) -> frozenset[int]:
        """Every layer that must be read."""
        return frozenset(self.layers) | frozenset(self.pick)

    @property
    def single_pass(self) -> bool:
        """Whether all is known before the first layer in which tokens are hidden."""
        return max(self.watched) < self.hide_from


def paper_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """The paper's layers at the same relative depth, always with a later one to prune in.

    Args:
        layers: the model's attention layers, ascending.
    """
    depth = len(layers)
    start = max(0, min(round(_START * depth / _DEPTH), depth - 2))
    count = max(1, min(_COUNT, depth - start - 1))
    return tuple(layers[start : start + count])


def plan(setting: Setting, chosen: Sequence[int], layers: Sequence[int]) -> Plan:
    """Say for one model where tokens are picked and hidden.

    The paper picks in the last detection layer and hides in every later one, which takes one pass.
    Where detection goes on to the model's last layer there is no later one; then tokens are picked
    at the paper's depth and hidden from there on in a second pass.

    `widen` and `search` always look again, so they can hide from the first layer on. What stands
    out is read in the detection layers up to the paper's depth, where a trigger is read; deeper
    ones also look at tokens that have copied it.

    Args:
        setting: gives the pruning rule.
        chosen: detection layers, resolved.
        layers: the model's attention layers, ascending.

    Raises:
        UsageError: a layer that the model does not have.
    """
    detection = tuple(sorted(set(chosen)))
    if not detection or not set(detection) <= set(layers):
        raise UsageError(
            f"layers {list(chosen)} are not layers of this model: choose from {list(layers)}."
        )
    deepest = paper_layers(layers)[-1]
    if setting.prune in LOOKING:
        early = tuple(layer for layer in detection if layer <= deepest)
        return Plan(detection, early or detection, min(layers))
    pick = detection[-1] if detection[-1] < max(layers) else deepest
    return Plan(detection, (pick,), pick + 1)
