"""From clean samples to all that makes a guard."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gazeguard.calibrate import conformal_threshold, needed_samples, supported_alpha
from gazeguard.errors import MeasurementError, UsageError
from gazeguard.guarding.measure import Measured, measure
from gazeguard.guarding.prompts import Prompts
from gazeguard.guarding.saved import Saved
from gazeguard.methods.cleansight.auto import CHANGES, changed, most_telling
from gazeguard.methods.cleansight.detector import MIN_FIT, Detector
from gazeguard.methods.cleansight.outliers import Outlying, outlying
from gazeguard.methods.cleansight.pruning import clean_levels
from gazeguard.methods.cleansight.settings import (
    SETTINGS,
    Layers,
    Prune,
    Setting,
    paper_layers,
    plan,
)
from gazeguard.models.fingerprint import fingerprint
from gazeguard.models.target import Target
from gazeguard.types import Sample

Outliers = Literal["refuse", "keep"]
Witness = Literal["all", "attention"]
log = logging.getLogger(__name__)

_OTHER_SPLITS = 10  # for the threshold's spread
_FAR_NATS, _FAR_TIMES = 5.0, 4.0  # of a row that diverges as no other does
_TOLD = 5  # outlying rows that are told with their distance and id


def resolved(
    setting: str | Setting, layers: Layers | None = None, prune: Prune | None = None
) -> Setting:
    """A setting by name or as it is, with its layers or pruning rule replaced."""
    if isinstance(setting, str):
        if setting not in SETTINGS:
            raise UsageError(f"no setting '{setting}': choose from {', '.join(SETTINGS)}.")
        setting = SETTINGS[setting]
    if layers is not None:
        setting = replace(setting, layers=layers)
    return setting if prune is None else replace(setting, prune=prune)


def wanted(setting: Setting, target: Target) -> tuple[int, ...]:
    """The layers to measure for a setting; all when the choice is still to be made."""
    if setting.layers in ("all", "auto"):
        return target.layers
    if setting.layers == "paper":
        return paper_layers(target.layers)
    return plan(setting, [int(layer) for layer in setting.layers], target.layers).layers


def fitted(
    target: Target,
    seen: Measured,
    alpha: float,
    setting: Setting,
    seed: int,
    copies: NDArray[np.float32] | None,
) -> Saved:
    """Fit the detector on one half of the usable samples and score the other; see `Guard.fit`.

    Raises:
        UsageError: too few usable samples for this alpha.
        MeasurementError: most samples have no finite ratio.
    """
    usable = np.flatnonzero(seen.finite)
    if len(usable) < len(seen) / 2:
        raise MeasurementError(
            f"{len(seen) - len(usable)} of {len(seen)} clean samples have no"
            " finite attention ratio: use prompts with words, or --dtype float32 if the model's"
            " numbers overflow."
        )
    witnesses = 2 if _compares(seen, alpha, len(usable)) else 1
    each = alpha / witnesses
    fit, rest = _halves(usable, each, seed)
    if setting.layers == "auto":
        if copies is None:
            raise UsageError("layers 'auto' need changed copies: use Guard.calibrate.")
        detection = most_telling(seen.ratio[fit], copies[:, fit], seen.layers)
    else:
        detection = wanted(setting, target)
    what = plan(setting, detection, target.layers)
    at = [seen.layers.index(layer) for layer in what.layers]
    features = seen.features(what.layers, setting.feature)
    detector = Detector.fit(features[fit], setting.distance)
    arrays = detector.arrays() | {
        "calibration": np.sort(detector.score(features[rest])),
        "levels": clean_levels(seen.strongest[fit][:, at]),
    }
    if witnesses > 1 and seen.divergence is not None:  # nothing is fitted: all rows may judge
        arrays["divergence"] = np.sort(seen.divergence[usable])
    thresholds = [conformal_threshold(arrays["calibration"], each)]
    for other in range(1, _OTHER_SPLITS + 1):
        learn, judge = _halves(usable, each, seed + other)
        scores = Detector.fit(features[learn], setting.distance).score(features[judge])
        thresholds.append(conformal_threshold(scores, each))
    counts = {"fit": len(fit), "threshold": len(rest), "left_out": len(seen) - len(usable)}
    words = [note.tokens for note in seen.notes]
    prompts = Prompts.fit([words[i] for i in fit], [words[i] for i in rest], alpha, seed)
    spread = (min(thresholds), max(thresholds))
    return Saved(
        setting,
        what,
        arrays,
        alpha,
        seed,
        counts,
        fingerprint(target),
        spread=spread,
        prompts=prompts,
    )


def _compares(seen: Measured, alpha: float, usable: int) -> bool:
    """Whether the model before the fine-tune is asked; each of two witnesses has half of alpha."""
    if seen.divergence is None:
        return False
    needed = needed_samples(alpha / 2) + MIN_FIT
    if usable < needed:
        log.warning(
            "%d clean samples are too few to compare with the model before its fine-tune at alpha"
            " %g: attention judges alone; give at least %d.",
            usable,
            alpha,
            needed,
        )
    return usable >= needed


def refuse_outliers(seen: Measured, seed: int) -> None:
    """Ask about calibration rows that stand apart from all others.

    Raises:
        UsageError: there are such rows; names them.
    """
    usable = np.flatnonzero(seen.finite)
    if seen.divergence is not None:
        _refuse_diverging(seen, usable)
    found = outlying(
        seen.ratio[usable],
        seen.strongest[usable],
        [seen.notes[i].prompt for i in usable],
        seed,
    )
    if found is not None:
        raise UsageError(_asked(seen, usable[found.rows], found))


def _refuse_diverging(seen: Measured, usable: NDArray[np.int64]) -> None:
    """Ask about a row that the model before its fine-tune would answer as no other row."""
    assert seen.divergence is not None
    order = usable[np.argsort(seen.divergence[usable], kind="stable")]
    if len(order) < 2:
        return
    last, before = seen.divergence[order[-1]], seen.divergence[order[-2]]
    if last > _FAR_NATS and last > _FAR_TIMES * before:
        note = seen.notes[order[-1]]
        raise UsageError(
            f"Calibration row {note.row} (id {note.sample_id[:12]}) stands apart from all others,"
            " as a poisoned row would: the model's answer diverges from that before its fine-tune"
            f" by {last:.1f} nats, the next row's by {before:.1f}; look at it, and take it out of"
            " the data, or accept it with --keep-outliers (in Python outliers='keep')."
        )


def _asked(seen: Measured, rows: NDArray[np.int64], found: Outlying) -> str:
    notes = [seen.notes[i] for i in rows]
    far = [f"{excess:.1f} times" for excess in found.excess[:_TOLD]]
    far[0] += " as far out as the median row"
    told = ", ".join(
        f"row {note.row} (id {note.sample_id[:12]}, {how})"
        for note, how in zip(notes[:_TOLD], far, strict=False)
    )
    if more := ", ".join(str(note.row) for note in notes[_TOLD:]):
        told += f", and rows {more}"
    stand, them = ("stands", "it") if len(notes) == 1 else ("stand", "them")
    return (
        f"{len(notes)} of {len(seen)} calibration rows {stand} apart from all others, as poisoned"
        f" rows would: {told}; look at {them}, and take {them} out of the data, or accept {them}"
        " with --keep-outliers (in Python outliers='keep')."
    )


def changed_ratios(
    target: Target, samples: Sequence[Sample], seen: Measured, batch_size: int, seed: int
) -> NDArray[np.float32]:
    """Log ratios of changed copies, aligned with `seen`, `(change, n, layer, head)`."""
    known = {note.sample_id for note in seen.notes}
    usable = [sample for sample in samples if sample.sample_id in known]
    again = measure(target, changed(usable, seed), layers=seen.layers, batch_size=batch_size)
    return again.ratio.reshape(len(CHANGES), len(seen), *seen.ratio.shape[1:])


def _halves(
    usable: NDArray[np.int64], alpha: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Random ones of some places for the fit, and for the threshold."""
    needed, samples = needed_samples(alpha), len(usable)
    for_threshold = max(samples - samples // 2, needed)
    if samples - for_threshold < MIN_FIT:
        best = samples - MIN_FIT
        cure = f"give more, or alpha {supported_alpha(best)}" if best > 0 else "give more"
        raise UsageError(
            f"{samples} usable clean samples are too few for alpha {alpha:g}, which takes"
            f" {needed + MIN_FIT} ({MIN_FIT} to fit, {needed} for the threshold): {cure}."
        )
    order = usable[np.random.default_rng([seed, 17]).permutation(samples)]
    return order[for_threshold:], order[:for_threshold]
