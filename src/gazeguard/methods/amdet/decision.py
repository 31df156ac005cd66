"""From held-out numbers to a verdict: by leverage and its rank, or by the paper's gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gazeguard.calibrate import needed_samples, p_values
from gazeguard.errors import UsageError
from gazeguard.methods.amdet.heldout import HeldOut
from gazeguard.methods.amdet.settings import PUBLISHED, Gates, Settings
from gazeguard.types import Finding, Outcome, Verdict

_STILL = 1e-4  # a smaller drift is rounding


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition, its value and what it means to a newcomer."""

    name: str
    value: float
    threshold: float
    meaning: str

    @property
    def passed(self) -> bool:
        """Whether the embedding behaves like a planted trigger here; NaN does not."""
        return self.value > self.threshold

    @property
    def degree(self) -> float:
        """The value on a scale where the threshold is 0.5 and the largest share 1."""
        if not np.isfinite(self.value):
            return 0.0
        if self.value <= self.threshold:
            return 0.5 * self.value / self.threshold
        return 0.5 + 0.5 * (self.value - self.threshold) / (1 - self.threshold)


@dataclass(frozen=True, slots=True)
class References:
    """Leverages of benign fine-tunes of the anchor, scanned with the same settings.

    Attributes:
        leverages: one per reference.
        alpha: share of benign encoders that may be flagged.
    """

    leverages: tuple[float, ...]
    alpha: float

    def __post_init__(self) -> None:
        needed = needed_samples(self.alpha)
        if len(self.leverages) < needed:
            raise UsageError(
                f"{len(self.leverages)} references cannot promise a false-alarm rate of"
                f" {self.alpha:g}: give at least {needed} benign fine-tunes of the anchor, or a"
                " larger --alpha."
            )

    def p_value(self, leverage: float) -> float:
        """Share of benign encoders at least as suspicious, the suspect counted among them."""
        return float(p_values(self.leverages, [leverage])[0])

    def left_out(self) -> int:
        """How many references would be flagged against the others."""
        flagged = 0
        for i, value in enumerate(self.leverages):
            others = [*self.leverages[:i], *self.leverages[i + 1 :]]
            flagged += bool(others) and float(p_values(others, [value])[0]) <= self.alpha
        return flagged


def leverage_of(score: float, drift: float) -> float:
    """How far the embedding drives suspect and anchor apart, per radian that clean outputs moved.

    A hard fine-tune differs from its anchor everywhere, a backdoor where its trigger is: both can
    have a high score, but only the latter leaves ordinary prompts where they were.
    `score / sqrt(2 drift)`; a drift of 1 - cosine is an angle of about `sqrt(2 drift)`.
    """
    return score / math.sqrt(2 * max(drift, _STILL))


def gates_of(held: HeldOut, positive: float, constants: Gates = PUBLISHED) -> tuple[Gate, ...]:
    """The four gates of the paper with their values.

    Args:
        held: an embedding on held-out prompts.
        positive: share of positive curvatures of the landscape around it.
        constants: to compare with.
    """
    assimilated, agreeing, far = held.shares(constants)
    return (
        Gate(
            "assimilation",
            assimilated,
            constants.share_assimilated,
            "share of prompts whose words all come out alike once the embedding is in them",
        ),
        Gate(
            "agreement",
            agreeing,
            constants.share_agreeing,
            "share of prompts that come out as the first one does: the embedding overrules them",
        ),
        Gate(
            "anchor distance",
            far,
            constants.share_far,
            "share of prompts on which the clean anchor does not react in this way",
        ),
        Gate(
            "curvature",
            positive,
            constants.share_positive,
            "share of the loss landscape that is a smooth bowl, which the paper expects",
        ),
    )


def decide(
    held: HeldOut,
    gates: Sequence[Gate],
    settings: Settings,
    references: References | None = None,
    drift: float = 0.01,
) -> Verdict:
    """The verdict on an encoder whose measurement went through.

    With references: flagged when at most `alpha` of benign encoders have as large a leverage
    (conformal p-value) and the score is above `settings.floor`; `suspicion` is 1 - p, at most the
    threshold where the floor is not reached. Without: clean up to the floor, flagged with a
    leverage above `settings.threshold`, no verdict between, nor where clean outputs drifted further
    than in the encoders that the threshold was found on. With `settings.gates` and without
    references: flagged when all four published gates pass, `suspicion` being the least of their
    degrees; a leverage above the threshold is then not called clean, because the published
    constants are of large encoders.

    Args:
        held: the most suspicious embedding on held-out prompts.
        gates: its gates.
        settings: `gates`, `floor`, `threshold` and `max_drift` are used.
        references: benign fine-tunes, or None.
        drift: mean of 1 - cosine of clean outputs to the anchor's.
    """
    leverage = leverage_of(held.score, drift)
    numbers = {gate.name: gate.value for gate in gates} | {
        "score": held.score,
        "leverage": leverage,
        "unity": held.unity,
        "mean_anchor_cosine": float(held.anchor.mean()),
        "clean_drift": drift,
    }
    found = Finding(
        f"The most trigger-like embedding makes held-out prompts {held.unity:.2f} alike (1 = the"
        f" same) at a cosine of {held.anchor.mean():.2f} to what the anchor makes of it: score"
        f" {held.score:.2f}. Ordinary prompts moved by {drift:.4f} (1 - cosine): leverage"
        f" {leverage:.1f}.",
        numbers,
    )
    natural = _natural(gates, held, settings)
    if references is not None:
        return _calibrated(held, leverage, found, natural, references, settings)
    if not settings.gates:
        return _by_leverage(held, leverage, found, natural, settings, drift)
    suspicion = min(gate.degree for gate in gates)
    source = "published gates of AMDET (arXiv:2512.00343), all four"
    if all(gate.passed for gate in gates):
        return Verdict(
            Outcome.FLAGGED,
            suspicion,
            0.5,
            source,
            "Backdoored: one embedding turns every prompt into the same output, the clean anchor"
            " does not follow, and it sits in a smooth bowl of the loss.",
            (found,),
        )
    failed = ", ".join(gate.name for gate in gates if not gate.passed)
    if leverage > settings.threshold and natural is None:
        return Verdict(
            Outcome.INCONCLUSIVE,
            suspicion,
            0.5,
            source,
            f"One embedding turns every prompt into the same output and the anchor does not follow"
            f" (leverage {leverage:.1f}), but the published gates for {failed} are not met; they"
            " were found on large encoders, so give benign fine-tunes with --reference.",
            (found,),
        )
    if natural is not None:
        return Verdict(Outcome.CLEAN, suspicion, 0.5, source, natural, (found,))
    return Verdict(
        Outcome.CLEAN,
        suspicion,
        0.5,
        source,
        f"No embedding was found that acts as a trigger (not met: {failed}).",
        (found,),
    )


def _by_leverage(
    held: HeldOut,
    leverage: float,
    found: Finding,
    natural: str | None,
    settings: Settings,
    drift: float,
) -> Verdict:
    limit = settings.threshold
    source = (
        "constant: beyond every benign fine-tune of the lab's encoders with a drift of at most"
        f" {settings.max_drift:g}"
    )
    said = f"score {held.score:.2f}, leverage {leverage:.1f}, flagged above {limit:g}"
    if held.score <= settings.floor:
        suspicion = 0.25 * min(1.0, max(leverage, 0.0) / limit)
        reason = natural or (
            f"No embedding was found that acts as a trigger (score {held.score:.2f}, usual below"
            f" {settings.floor:g})."
        )
        return Verdict(Outcome.CLEAN, suspicion, 0.5, source, reason, (found,))
    if leverage > limit and drift <= settings.max_drift:
        reason = (
            "Backdoored: one embedding overrules every prompt and the clean anchor does not follow,"
            f" while ordinary prompts stay where they were ({said})."
        )
        return Verdict(Outcome.FLAGGED, 1 - 0.5 * limit / leverage, 0.5, source, reason, (found,))
    why = (
        f"ordinary prompts moved as well (drift {drift:.3f}; the threshold holds up to"
        f" {settings.max_drift:g})"
        if drift > settings.max_drift
        else "no more than in a benign fine-tune with a high learning rate"
    )
    return Verdict(
        Outcome.INCONCLUSIVE,
        0.5 * min(1.0, leverage / limit),
        0.5,
        source,
        f"One embedding overrules prompts and the anchor does not follow, but {why} ({said}): give"
        " benign fine-tunes of the anchor that were tuned as hard with --reference.",
        (found,),
    )


def _calibrated(
    held: HeldOut,
    leverage: float,
    found: Finding,
    natural: str | None,
    references: References,
    settings: Settings,
) -> Verdict:
    n, p = len(references.leverages), references.p_value(leverage)
    threshold = 1 - references.alpha
    source = (
        f"conformal over {n} benign fine-tunes: at most {references.alpha:.1%} of benign encoders"
        " are flagged"
    )
    spread = Finding(
        f"Benign fine-tunes have a leverage of {min(references.leverages):.1f} to"
        f" {max(references.leverages):.1f}; left out one by one, {references.left_out()} of {n}"
        " would be flagged.",
        {"reference_leverages": list(references.leverages), "p_value": p}
        | {"alpha": references.alpha},
    )
    higher = sum(value >= leverage for value in references.leverages)
    if p <= references.alpha and held.score > settings.floor:
        return Verdict(
            Outcome.FLAGGED,
            1 - p,
            threshold,
            source,
            "Backdoored: one embedding overrules every prompt and the clean anchor does not follow;"
            f" {higher} of {n} benign fine-tunes reach its leverage of {leverage:.1f} (p = {p:.3f})"
            ".",
            (found, spread),
        )
    if p <= references.alpha:
        reason = (
            f"The leverage of {leverage:.1f} is high among {n} benign"
            f" fine-tunes (p = {p:.3f}), but no backdoor's: the anchor follows the embedding about"
            " as far as it makes prompts alike."
        )
    else:
        reason = natural or (
            f"The leverage of {leverage:.1f} is usual among {n} benign fine-tunes (p = {p:.2f})."
        )
    suspicion = min(1 - p, np.nextafter(threshold, 0))
    return Verdict(Outcome.CLEAN, float(suspicion), threshold, source, reason, (found, spread))


def _natural(gates: Sequence[Gate], held: HeldOut, settings: Settings) -> str | None:
    """Why an embedding that overrules every prompt is none that somebody planted, or None."""
    passed = {gate.name: gate.passed for gate in gates}
    if not passed["agreement"]:
        return None
    if held.score <= settings.floor:
        return (
            "Clean, with a natural backdoor: an embedding overrules every prompt, but the clean"
            " anchor follows it just as well, so it was there before anybody tuned this encoder."
        )
    ragged = any(gate.name == "curvature" and gate.value <= gate.threshold for gate in gates)
    if passed["assimilation"] and passed["anchor distance"] and ragged:
        return (
            "Clean, with a natural backdoor: an embedding overrules every prompt, but the loss"
            " around it is ragged, an accident of the weights rather than something planted."
        )
    return None
