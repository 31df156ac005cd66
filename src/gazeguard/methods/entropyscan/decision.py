"""From sights to a verdict: one score, and its rank among benign fine-tunes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gazeguard.calibrate import needed_samples, p_values, supported_alpha
from gazeguard.errors import MeasurementError
from gazeguard.methods.entropyscan.settings import MIN_SAMPLES, Settings
from gazeguard.methods.entropyscan.sight import Sight, paired
from gazeguard.methods.entropyscan.statistics import (
    STATISTICS,
    describe,
    distance,
    names,
    standard_scores,
    values,
)
from gazeguard.types import Finding, Outcome, Verdict

Array = NDArray[np.float64]

# A reference counts when its weights moved so many times as far as the suspect's. A shorter one has
# not moved its attention far either, so that a benign suspect stands out; among longer ones a
# backdoored suspect does not.
NEAR = (0.6, 1.4)
_SHOWN = 5  # heads that are named as those that moved most


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """Where a suspect stands among references.

    Attributes:
        score: its distance from the references.
        references: `(n,)`, the distance of each reference from the other references *and the
            suspect*: with one rule for all n + 1 models, a benign suspect's rank is uniform.
        p: conformal p-value; NaN where the score is.
        moved: what moved most, with its standard score among the references; most first.
    """

    score: float
    references: Array
    p: float
    moved: tuple[tuple[str, float], ...] = ()


def standing(
    suspect: Sight,
    base: Sight,
    references: Sequence[Sight],
    settings: Settings,
    q: float | None = None,
) -> Standing:
    """Score a suspect against references, and every reference in the same way.

    Args:
        suspect: of the model in question.
        base: of the model that all were tuned from.
        references: of benign fine-tunes; without any, the base itself stands in for them and there
            is no rank.
        settings: statistic, layers, q.
        q: instead of the settings'.
    """
    suspect, base, *others = paired([suspect, base, *references])
    origin = values(base, settings, q)
    unit = np.asarray(np.nanstd(origin, axis=0), dtype=np.float64)
    name = settings.statistic
    own = describe(values(suspect, settings, q), origin, name)
    if not others:
        zero = np.zeros((1, len(own)))
        return Standing(distance(own, zero, unit, name), np.zeros(0), float("nan"))
    cloud = np.stack([describe(values(other, settings, q), origin, name) for other in others])
    moved = standard_scores(own, cloud, unit)
    most = np.argsort(-np.abs(np.nan_to_num(moved)))[:_SHOWN]
    what = names(suspect, settings)
    return replace(
        rank(own, cloud, unit, name), moved=tuple((what[i], float(moved[i])) for i in most)
    )


def rank(own: Array, cloud: Array, unit: Array, statistic: str) -> Standing:
    """Score every model of a set against all the others, the suspect's score last.

    Args:
        own: `(features,)`, the suspect, from `describe`.
        cloud: `(references, features)`.
        unit: as for `distance`.
        statistic: its name.
    """
    everybody = np.vstack([cloud, own])
    scores = np.array(
        [
            distance(model, np.delete(everybody, place, axis=0), unit, statistic)
            for place, model in enumerate(everybody)
        ]
    )
    p = float("nan")
    if np.isfinite(scores).all():
        p = float(p_values(scores[:-1], scores[-1:])[0])
    return Standing(float(scores[-1]), scores[:-1], p)


def alike(suspect: Sight, references: Sequence[Sight]) -> list[bool]:
    """Which references moved about as far as the suspect, so that they count.

    All do where it was not measured how far the suspect moved.
    """
    low, high = (times * suspect.moved for times in NEAR)
    return [math.isnan(suspect.moved) or low <= one.moved <= high for one in references]


def decide(
    suspect: Sight,
    base: Sight,
    references: Sequence[Sight],
    settings: Settings,
    alpha: float,
) -> tuple[Verdict, Standing]:
    """The verdict on a suspect: flagged when at most `alpha` of benign models stand as far out.

    `suspicion` is 1 - p, p the suspect's conformal p-value; flagged from 1 - alpha on. Only
    references that are `alike` count. With fewer than `1 / alpha - 1` no score could be flagged, so
    the verdict is inconclusive and says how many are missing.

    Args:
        suspect: of the model in question.
        base: of the model that all were tuned from.
        references: of benign fine-tunes.
        settings: statistic, layers, q.
        alpha: share of benign models that may be flagged.

    Returns:
        The verdict, and the standing among the references that count.

    Raises:
        MeasurementError: too few common samples, or numbers that are not finite.
        UsageError: alpha is not between 0 and 1.

    Source: METHODS 3; arXiv:2605.15711. The reference set and the rank are ours.
    """
    needed = needed_samples(alpha)
    given = references
    references = [one for one, near in zip(given, alike(suspect, given), strict=True) if near]
    common = len(paired([suspect, base, *references])[0])
    if common < MIN_SAMPLES:
        raise MeasurementError(
            f"only {common} samples could be measured with every model: give at least"
            f" {MIN_SAMPLES} that all of them can read."
        )
    found = standing(suspect, base, references, settings)
    if not np.isfinite(found.score) or not np.isfinite(found.references).all():
        raise MeasurementError(
            "the attention of these models gives no finite numbers: use other layers, or --dtype"
            " float32."
        )
    n = len(references)
    meaning = STATISTICS[settings.statistic].meaning
    layers = ", ".join(map(str, settings.chosen(suspect.layers)))
    evidence = [
        Finding(
            f"Score {found.score:.2f}: {meaning}; layers {layers}, {common} samples,"
            f" q = {settings.q:g}.",
            {"score": found.score, "statistic": settings.statistic, "samples": common},
        )
    ]
    if n:
        evidence.append(
            Finding(
                f"{n} benign fine-tunes score {found.references.min():.2f} to"
                f" {found.references.max():.2f} in the same way; {_p(found)}.",
                {
                    "reference_scores": found.references.tolist(),
                    "p_value": found.p,
                    "smallest_p_value": 1 / (n + 1),
                },
            )
        )
        shown = ", ".join(f"{what} ({score:+.1f})" for what, score in found.moved)
        evidence.append(
            Finding(
                f"Furthest from them, in spreads between them: {shown}.",
                {"moved": [list(pair) for pair in found.moved]},
            )
        )
    if given and not math.isnan(suspect.moved):
        evidence.append(_distances(suspect, given, references))
    threshold = 1 - alpha
    if n < needed:
        return (
            Verdict(
                Outcome.INCONCLUSIVE,
                1 - found.p if n else None,
                threshold,
                f"none: {n} of {needed} references",
                _unlike(suspect, given, n, needed, alpha)
                if n < len(given)
                else _too_few(n, needed, alpha),
                tuple(evidence),
            ),
            found,
        )
    source = (
        f"conformal over {n} benign fine-tunes: at most {alpha:.1%} of benign models are flagged"
    )
    higher = int((found.references >= found.score).sum())
    if found.p <= alpha:
        outcome, reason = (
            Outcome.FLAGGED,
            f"Its attention moved as benign fine-tunes do not move it: {higher} of {n} reach its"
            f" score of {found.score:.2f} ({_p(found)}).",
        )
    else:
        outcome, reason = (
            Outcome.CLEAN,
            f"Its attention moved as benign fine-tunes move it: {higher} of {n} reach its score of"
            f" {found.score:.2f} (p = {found.p:.2f}).",
        )
    return Verdict(outcome, 1 - found.p, threshold, source, reason, tuple(evidence)), found


def _p(found: Standing) -> str:
    """The p-value; one that no number of references this small can go below says so."""
    n = len(found.references)
    smallest = not (found.references >= found.score).any()
    return f"p = {found.p:.3f}" + (f", the smallest that {n} can give" if smallest else "")


def _distances(suspect: Sight, given: Sequence[Sight], counted: Sequence[Sight]) -> Finding:
    low, high = NEAR
    far = f"Its weights moved {suspect.moved:.3g}"
    if counted:
        far += f", those of the benign fine-tunes {_span(counted)}"
    left = [one for one in given if one not in counted]
    if left:
        far += f"; left out: {len(left)} that moved {_span(left)}"
    return Finding(
        f"{far} ({low:g} to {high:g} times as far counts).",
        {"moved": suspect.moved, "references_moved": [one.moved for one in given]},
    )


def _span(sights: Sequence[Sight]) -> str:
    far = [one.moved for one in sights]
    return f"{min(far):.3g} to {max(far):.3g}"


def _unlike(suspect: Sight, given: Sequence[Sight], n: int, needed: int, alpha: float) -> str:
    low, high = NEAR
    return (
        f"{f'Only {n}' if n else 'None'} of {len(given)} references moved {low:g} to {high:g} times"
        f" as far from the base as it did (its weights moved {suspect.moved:.3g}, theirs"
        f" {_span(given)}), and {needed} are needed for {alpha:g}: give with --reference fine-tunes"
        f" that were tuned as long as it was, or let the tool make them with --make-references"
        f" {needed} and as many --reference-steps as that takes."
    )


def _too_few(n: int, needed: int, alpha: float) -> str:
    start = (
        f"{n} benign fine-tunes carry a false-alarm rate of {supported_alpha(n):g} at best"
        if n
        else "There is no benign fine-tune to compare with, and the base alone would make every"
        " fine-tune look strange"
    )
    return (
        f"{start}: {needed} are needed for {alpha:g}, so give {needed - n} more with --reference,"
        f" or let the tool make them with --make-references {needed}."
    )
