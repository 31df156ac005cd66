"""Model-level defences: EntropyScan on vision-language models, AMDET on text encoders.

What is measured of a model depends on no other one and is kept in the run's work folder, so that a
reference of many suspects is looked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gazeguard.bench.amdet_scans import Seen, seen_of
from gazeguard.bench.defences.registry import defence
from gazeguard.bench.entropyscan import PAPER, SAMPLES, sight_of
from gazeguard.bench.subject import Judged, Suspect
from gazeguard.calibrate import needed_samples, p_values
from gazeguard.errors import MeasurementError
from gazeguard.methods.amdet import References
from gazeguard.methods.amdet import Settings as Search
from gazeguard.methods.amdet.decision import decide as decide_encoder
from gazeguard.methods.amdet.decision import gates_of
from gazeguard.methods.entropyscan import Settings, Sight, decide

ALPHA = 0.05


@defence("entropyscan", "model", ours=True)
def entropyscan(suspect: Suspect) -> Judged:
    """`gazeguard scan` with benign fine-tunes as references, alpha 5 %."""
    return _by_sight(suspect, Settings())


@defence("entropyscan-paper", "model")
def entropyscan_paper(suspect: Suspect) -> Judged:
    """The published statistic (head-mean entropy of the first layers) among the same references."""
    return _by_sight(suspect, PAPER.settings)


@defence("weights-moved", "model")
def weights_moved(suspect: Suspect) -> Judged:
    """Looks at no attention: how far the weights are from the base's, among the references."""
    own = _sight(suspect, suspect.model)[1]
    others = [_sight(suspect, reference)[1] for reference in suspect.references]
    return _ranked(own, others)


@defence("amdet", "model", kind="encoder", ours=True)
def amdet(suspect: Suspect) -> Judged:
    """`gazeguard scan` with benign fine-tunes as references, alpha 5 %."""
    others = [_seen(suspect, reference) for reference in suspect.references]
    known = tuple(one.leverage for one in others if one.held is not None)
    if len(known) < needed_samples(ALPHA):
        return Judged("inconclusive", None)
    return _by_search(_seen(suspect, suspect.model), Search(), References(known, ALPHA))


@defence("amdet-threshold", "model", kind="encoder", ours=True)
def amdet_threshold(suspect: Suspect) -> Judged:
    """`gazeguard scan` without references: the leverage against a constant."""
    return _by_search(_seen(suspect, suspect.model), Search(), None)


@defence("amdet-published", "model", kind="encoder")
def amdet_published(suspect: Suspect) -> Judged:
    """The paper's four gates with its constants, on the embedding that our search finds."""
    return _by_search(_seen(suspect, suspect.model), replace(Search(), gates=True), None)


@defence("drift", "model", kind="encoder")
def drift(suspect: Suspect) -> Judged:
    """Looks for no trigger: how far clean outputs moved from the anchor's, among the references."""
    others = [_seen(suspect, reference) for reference in suspect.references]
    known = [one.drift for one in others if np.isfinite(one.drift)]
    return _ranked(_seen(suspect, suspect.model).drift, known)


def _by_sight(suspect: Suspect, settings: Settings) -> Judged:
    first = np.arange(min(settings.samples, SAMPLES))
    base, own, *others = (
        _sight(suspect, model)[0].take(first)
        for model in (None, suspect.model, *suspect.references)
    )
    try:
        verdict, found = decide(own, base, others, settings, ALPHA)
    except MeasurementError:
        return Judged("inconclusive", None)
    return Judged(str(verdict.outcome), found.score)


def _sight(suspect: Suspect, model: Path | None) -> tuple[Sight, float]:
    return sight_of(suspect.base, model, suspect.work / "entropyscan", SAMPLES)


def _by_search(seen: Seen, settings: Search, references: References | None) -> Judged:
    if seen.held is None:
        return Judged("inconclusive", None)
    gates = gates_of(seen.held, seen.positive)
    verdict = decide_encoder(seen.held, gates, settings, references, seen.drift)
    score = verdict.suspicion if settings.gates else seen.leverage
    return Judged(str(verdict.outcome), score)


def _seen(suspect: Suspect, model: Path) -> Seen:
    return seen_of(model, suspect.base, Search(), suspect.work / "amdet")[0]


def _ranked(own: float, others: Sequence[float]) -> Judged:
    """Flagged when at most ALPHA of the references lie as far out."""
    if len(others) < needed_samples(ALPHA) or not np.isfinite(own):
        return Judged("inconclusive", None)
    p = float(p_values(list(others), [own])[0])
    return Judged("flagged" if p <= ALPHA else "clean", own)
