"""CleanSight as a guard runs it, its published form, and its ablations (arXiv:2603.12989).

All judge the requests from the traffic's one look. What is flagged is answered anew under the
guard; all other answers are, bit for bit, those without a guard.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gazeguard.bench.defences.registry import Function, defence
from gazeguard.bench.guard import VARIANTS, PruneAtRandom, PruneEverybody
from gazeguard.bench.subject import BATCH, Responses, Traffic
from gazeguard.calibrate import supported_alpha
from gazeguard.guarding.calibration import changed_ratios
from gazeguard.guarding.guard import ALPHA, Guard
from gazeguard.methods.cleansight.settings import DEFAULT_SETTING, SETTINGS, Setting

ABLATIONS: dict[str, tuple[str, str]] = {
    "cleansight-paper-log": (
        "paper layers, log ratio",
        "The published form on the logarithm of the ratio; hides above a tau of 1e-3.",
    ),
    "cleansight-paper-ledoit": (
        "paper layers, ledoit-wolf",
        "The same with the covariance between heads in the distance.",
    ),
    "cleansight-auto": (
        "auto layers",
        "Three layers chosen on clean requests, log ratio, hides by widening.",
    ),
    "cleansight-widen": (
        "all layers, ledoit-wolf, widen",
        "The default's detection; hides by widening instead of by search.",
    ),
    "cleansight-tau": (
        "all layers, ledoit-wolf, tau",
        "The default's detection; hides what is above a tau of 1e-3.",
    ),
}
"""Name -> variant of `bench.guard`, what it is."""


def fit(traffic: Traffic, setting: Setting, *, earlier: bool = False) -> Guard:
    """A guard on the known requests, at an alpha of 1 % or what so few of them support.

    With two witnesses each gets that alpha: the table's false alarms are those of both.
    """
    usable = int(traffic.known_ratios.finite.sum())
    alpha = max(ALPHA, supported_alpha(max(1, usable - usable // 2))) * (2 if earlier else 1)
    known = traffic.known_ratios
    if not earlier:
        known = replace(known, divergence=None)
    copies = None
    if setting.layers == "auto":
        copies = changed_ratios(
            traffic.target, traffic.known, traffic.known_ratios, BATCH, traffic.seed
        )
    return Guard.fit(
        traffic.target,
        known,
        alpha=alpha,
        setting=setting,
        seed=traffic.seed,
        copies=copies,
    )


def guarded(traffic: Traffic, guard: Guard) -> Responses:
    """Detection from the one look; answers anew for what is flagged."""
    seen = traffic.asked_ratios.features(guard.plan.layers, guard.setting.feature)
    score = guard.detector.score(seen)
    flagged = score > guard.threshold
    divergence = traffic.asked_ratios.divergence
    if guard.most_divergent is not None and divergence is not None:
        flagged |= divergence > guard.most_divergent
        # One score for the curves: how far beyond its own threshold the louder witness is.
        score = np.maximum(score / guard.threshold, divergence / guard.most_divergent)
    answers: list[str | None] = [*traffic.plain]
    places = np.flatnonzero(flagged).tolist()
    anew = traffic.answers([traffic.asked[i] for i in places], guard)
    for place, text in zip(places, anew, strict=True):
        answers[place] = text
    return Responses(answers, score, flagged)


@defence("guard", "input", ours=True)
def both(traffic: Traffic) -> Responses:
    """`gazeguard guard` as it is: attention, and the model before its fine-tune."""
    return guarded(traffic, fit(traffic, SETTINGS[DEFAULT_SETTING], earlier=True))


@defence("cleansight", "input", ours=True)
def default(traffic: Traffic) -> Responses:
    """`gazeguard calibrate --witness attention`: where the model looks, and that alone."""
    return guarded(traffic, fit(traffic, SETTINGS[DEFAULT_SETTING]))


@defence("cleansight-all", "input", ours=True)
def every_layer(traffic: Traffic) -> Responses:
    """`gazeguard guard --setting all`: all layers, each head by itself."""
    return guarded(traffic, fit(traffic, SETTINGS["all"]))


@defence("cleansight-paper", "input")
def paper(traffic: Traffic) -> Responses:
    """The published form: three middle layers, plain ratio, hides above a tau of 1e-4."""
    return guarded(traffic, fit(traffic, SETTINGS["paper"]))


@defence("prune-everybody", "input")
def everybody(traffic: Traffic) -> Responses:
    """Ablation: the published pruning of every request, without detection."""
    guard = PruneEverybody(fit(traffic, SETTINGS["paper"]))
    return Responses([*traffic.answers(traffic.asked, guard)])


@defence("prune-random", "input")
def at_random(traffic: Traffic) -> Responses:
    """Ablation: the published detection; a random 90 % of the picture's tokens is hidden."""
    return guarded(traffic, PruneAtRandom(fit(traffic, SETTINGS["paper"]), traffic.seed))


def _of_variant(variant: str) -> Function:
    def run(traffic: Traffic) -> Responses:
        return guarded(traffic, fit(traffic, VARIANTS[variant]))

    return run


for _name, (_variant, _about) in ABLATIONS.items():
    defence(_name, "input", about=_about)(_of_variant(_variant))
