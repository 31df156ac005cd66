"""Scanning one vision-language model, from its name to an entry of the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError

from gazeguard.errors import GazeguardError, MeasurementError, ModelError
from gazeguard.methods.entropyscan import Settings, Sight, Standing, alike, decide, standing
from gazeguard.methods.entropyscan.sight import paired
from gazeguard.models.difference import Difference, tuned_parts
from gazeguard.models.target import Target
from gazeguard.scanning.look import look
from gazeguard.scanning.models import VISION_LANGUAGE
from gazeguard.scanning.result import ScannedModel, Status
from gazeguard.scanning.samples import SampleSet
from gazeguard.scanning.store import Store, digest
from gazeguard.scanning.subject import Subject
from gazeguard.tuning.references import moved, moved_apart
from gazeguard.types import Finding, Outcome, Verdict

METHOD = "entropyscan"
_DRAWN_SAMPLES = 128  # rows of the report's heat map, at most

Steps = Callable[[int, int], None]
Maker = Callable[[Subject, Difference, float], Sequence[Subject]]


@dataclass(frozen=True)
class VisionScan:
    """Everything that is the same for all vision-language models of a list.

    Attributes:
        base: the model that all suspects were made from.
        references: known-clean fine-tunes of it.
        samples: benign samples.
        settings: of the method.
        alpha: share of benign models that may be flagged.
        dtype, device: of all models.
        batch_size: samples per forward pass; None suits it to the device.
        store: of sights and finished results.
        make: makes benign fine-tunes of the suspect's kind that move about as far, or None.
    """

    base: Subject
    references: Sequence[Subject]
    samples: SampleSet
    settings: Settings
    alpha: float
    dtype: str
    device: str
    batch_size: int | None
    store: Store
    make: Maker | None = None
    _seen: dict[str, Sight] = field(default_factory=dict)

    def scan(self, model: str, progress: Steps | None) -> ScannedModel:
        """Scan one model, or take an earlier run's result.

        Raises:
            ModelError: it cannot be used, or was not made from the base.
        """
        suspect = Subject.of(model, self.base.folder)
        difference = suspect.difference(self.base.folder)
        began = time.monotonic()
        try:
            if difference.kind == "none":
                found = self._entry(suspect, _untouched(), {}, {}, began)
            else:
                found = self._scanned(suspect, difference, progress, began)
        except MeasurementError as error:  # its own, or of references made for it
            found = self._entry(suspect, _unmeasured(error), {}, {}, began)
        if suspect.note and found.verdict is not None:
            told = replace(found.verdict, evidence=(*found.verdict.evidence, Finding(suspect.note)))
            found = replace(found, verdict=told)
        return found.without(suspect.unread)

    def _scanned(
        self, suspect: Subject, difference: Difference, progress: Steps | None, began: float
    ) -> ScannedModel:
        """The entry of a tuned model, or an earlier run's."""
        own = self.look_at(suspect, progress, keep=False)
        _check_moved(suspect, self.base, own.moved)
        known = self._references(suspect, difference, own.moved)
        references = [r for r in known if not _same(r, suspect)]
        key = self.store.key(
            suspect=suspect.hashes,
            base=self.base.hashes,
            references=[r.hashes for r in references],
            alpha=self.alpha,
            settings=self.settings.as_dict(),
            **self._conditions(),
        )
        found = self.store.get(key, suspect.name)
        if found is None:
            found = self._judge(suspect, own, difference, references, progress, began)
            self.store.put(key, found)
        return found

    def look_ahead(self, models: Sequence[str]) -> dict[str, Sight]:
        """Make and look at all references that `scan` will need for these models.

        A model that cannot be used is passed over: its own scan says so.

        Returns:
            `seen`, for `know` of a scanner in another process.
        """
        for model in models:
            with suppress(GazeguardError):
                suspect = Subject.of(model, self.base.folder)
                difference = suspect.difference(self.base.folder)
                if difference.kind != "none":
                    distance = self._distance(suspect)
                    _check_moved(suspect, self.base, distance)
                    for reference in self._references(suspect, difference, distance):
                        self.look_at(reference)
        return self.seen

    @property
    def seen(self) -> dict[str, Sight]:
        """The sights in memory."""
        return self._seen

    def know(self, sights: Mapping[str, Sight]) -> None:
        """Take what another process saw."""
        self._seen.update(sights)

    def look_at(
        self, subject: Subject, progress: Steps | None = None, *, keep: bool = True
    ) -> Sight:
        """A model's sight, from memory or disk where it was looked at before.

        Args:
            subject: the model.
            progress: called with samples done and samples in all.
            keep: whether it stays in memory; not needed for suspects, which are looked at once.

        Raises:
            ModelError: it cannot be used, or reads the samples as other tokens than the base.
            MeasurementError: its numbers are not finite.
        """
        key = self._key(subject)
        sight = self._seen.get(key) or self._stored(key) or self._measured(subject, key, progress)
        if keep:
            self._seen[key] = sight
        if subject != self.base:
            self._check_prompts(subject, sight)
        return sight

    def _stored(self, key: str) -> Sight | None:
        data = self.store.get_blob("sights", key)
        try:
            sight = None if data is None else Sight.from_bytes(data)
        except (ValueError, KeyError, TypeError, SafetensorError):  # damaged: measured again
            return None
        return None if sight is None or math.isnan(sight.moved) else sight

    def _measured(self, subject: Subject, key: str, progress: Steps | None) -> Sight:
        target = subject.load(self.dtype, self.device)
        sight = look(
            target,
            self.samples,
            self.settings.probed,
            batch_size=self.batch_size,
            progress=progress,
        )
        sight = replace(sight, moved=self._far(subject, target))
        self.store.put_blob("sights", key, sight.to_bytes())
        return sight

    def _distance(self, subject: Subject) -> float:
        """How far its weights moved, without a look at what it does."""
        key = self._key(subject)
        sight = self._seen.get(key) or self._stored(key)
        if sight is not None:
            return sight.moved
        return self._far(subject, subject.load(self.dtype, self.device))

    def _far(self, subject: Subject, target: Target) -> float:
        if subject.adapter is not None:
            return moved(target.model)
        if subject.folder == self.base.folder:
            return 0.0
        return moved_apart(subject.folder, self.base.folder)

    def _check_prompts(self, subject: Subject, sight: Sight) -> None:
        own, base = paired([sight, self.look_at(self.base)])
        if own.layers != base.layers or own.head_entropy.shape != base.head_entropy.shape:
            raise ModelError(
                f"{subject.name} has other layers or heads than {self.base.name}: give the model"
                " that it was made from as --reference."
            )
        if own.prompt != base.prompt:
            raise ModelError(
                f"{subject.name} reads the samples as other tokens than {self.base.name} does"
                " (another tokenizer, chat template or image processing): give the model that it"
                " was made from as --reference."
            )

    def _key(self, subject: Subject) -> str:
        return self.store.key(model=subject.hashes, **self._conditions())

    def _conditions(self) -> dict[str, Any]:
        """What a sight depends on beside the model."""
        return {
            "samples": self.samples.fingerprint,
            "q": list(self.settings.probed),
            "dtype": self.dtype,
            "device": self.device.split(":")[0],
            "batch": self.batch_size,
        }

    def _references(
        self, suspect: Subject, difference: Difference, distance: float
    ) -> list[Subject]:
        made = [] if self.make is None else list(self.make(suspect, difference, distance))
        return [*self.references, *made]

    def _judge(
        self,
        suspect: Subject,
        own: Sight,
        difference: Difference,
        references: Sequence[Subject],
        progress: Steps | None,
        began: float,
    ) -> ScannedModel:
        base = self.look_at(self.base)
        given = [self.look_at(reference, progress) for reference in references]
        verdict, found = decide(own, base, given, self.settings, self.alpha)
        counts = alike(own, given)
        clean = [sight for sight, counted in zip(given, counts, strict=True) if counted]
        scores = iter(found.references.tolist())
        tuned = Finding(
            f"It differs from {self.base.name} in {difference}.",
            {"kind": difference.kind, "tensors": len(difference.changed)},
        )
        verdict = Verdict(
            verdict.outcome,
            verdict.suspicion,
            verdict.threshold,
            verdict.threshold_source,
            verdict.reason,
            (*verdict.evidence, tuned),
        )
        numbers = {
            "score": found.score,
            "p_value": found.p if clean else None,
            "smallest_p_value": 1 / (len(clean) + 1) if clean else None,
            "moved": own.moved,
            "references": [
                {"model": r.name, "moved": s.moved, "score": next(scores) if counted else None}
                for r, s, counted in zip(references, given, counts, strict=True)
            ],
            "statistic": self.settings.statistic,
            "layers": list(self.settings.chosen(own.layers)),
            "samples": len(paired([own, base, *clean])[0]),
            "tuned": {"kind": difference.kind, **tuned_parts(difference.changed)},
        }
        figures = self._figures(own, base, clean, found)
        return self._entry(suspect, verdict, numbers, figures, began)

    def _figures(
        self, own: Sight, base: Sight, clean: Sequence[Sight], found: Standing
    ) -> dict[str, Any]:
        """What the page draws: `standing`, `by_q`, `shift` and `maps` (see `report.scan.sights`).

        `shift` is the head-mean entropy of every layer and sample less that of the references
        (of the base where there are none), in units of the references' spread.
        """
        by_q = []
        for q in own.q:
            other = standing(own, base, clean, self.settings, q)
            p = other.p if np.isfinite(other.p) else None
            by_q.append({"q": q, "score": other.score, "p_value": p})
        seen = paired([own, base, *clean])
        index = own.q.index(self.settings.q)
        entropy = np.stack([sight.entropy[:_DRAWN_SAMPLES, :, index] for sight in seen])
        others = entropy[2:] if clean else entropy[1:2]
        spread = others.std(0) if len(clean) > 1 else entropy[1].std(0)[None]
        shift = (entropy[0] - others.mean(0)) / np.maximum(spread, np.median(spread) or 1.0)
        known = list(clean) or [base]
        layers = [own.layers.index(layer) for layer in self.settings.chosen(own.layers)]
        return {
            "standing": {"suspect": found.score, "references": found.references.tolist()},
            "by_q": by_q,
            "shift": {
                "layers": list(own.layers),
                "rows": np.round(shift.T.astype(float), 2).tolist(),
            },
            "maps": {
                "suspect": _map(own.maps[layers]),
                "reference": _map(np.mean([sight.maps[layers] for sight in known], axis=0)),
            },
        }

    def _entry(
        self,
        suspect: Subject,
        verdict: Verdict,
        numbers: dict[str, Any],
        figures: dict[str, Any],
        began: float,
    ) -> ScannedModel:
        return ScannedModel(
            suspect.name,
            Status.DONE,
            VISION_LANGUAGE,
            METHOD,
            verdict,
            numbers=numbers,
            figures=figures,
            fingerprint=digest(suspect.hashes),
            seconds=time.monotonic() - began,
        )


def _same(a: Subject, b: Subject) -> bool:
    return a.hashes == b.hashes


def _check_moved(suspect: Subject, base: Subject, distance: float) -> None:
    if not math.isfinite(distance):
        raise MeasurementError(
            f"the weights of {suspect.name} are not finite, so they are broken: try another copy."
        )
    if distance == 0:
        raise MeasurementError(
            f"the adapter {suspect.name} changes no weight of {base.name}: it was saved before it"
            " was tuned, or only in part; give the finished one."
        )


def _map(maps: np.ndarray[Any, np.dtype[np.float32]]) -> list[list[float]]:
    """Mean over layers, as JSON; empty where no sample had a plain grid."""
    return np.round(maps.mean(0).astype(float), 6).tolist() if maps.size else []


def _unmeasured(error: MeasurementError) -> Verdict:
    sentence = str(error)
    return Verdict(Outcome.INCONCLUSIVE, None, None, "", sentence[:1].upper() + sentence[1:])


def _untouched() -> Verdict:
    return Verdict(
        Outcome.CLEAN,
        0.0,
        None,
        "identity",
        "Its weights are those of the reference: what the reference does, it does too.",
    )
