"""`Guard`: calibrated once on clean inputs, then judging every call of its model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gazeguard.calibrate import (
    CONFIDENCE,
    conformal_threshold,
    needed_samples,
    p_values,
    rate_bound,
)
from gazeguard.errors import ModelError, UsageError
from gazeguard.guarding.calibration import (
    Outliers,
    Witness,
    changed_ratios,
    fitted,
    refuse_outliers,
    resolved,
    wanted,
)
from gazeguard.guarding.earlier import check_switch
from gazeguard.guarding.measure import Measured, OnSkip, Progress, measure
from gazeguard.guarding.prompts import words_of
from gazeguard.guarding.saved import Saved, read, write
from gazeguard.guarding.selfcheck import prove
from gazeguard.guarding.verdict import NOT_COMPARED, GuardVerdict, judged, unjudged
from gazeguard.guarding.watch import Mode, Watch
from gazeguard.methods.cleansight.detector import Detector
from gazeguard.methods.cleansight.looks import Hiding, Look
from gazeguard.methods.cleansight.pruning import above_tau, widening, widest
from gazeguard.methods.cleansight.search import searching
from gazeguard.methods.cleansight.settings import (
    DEFAULT_SETTING,
    LOOKING,
    SEARCH,
    WIDEN,
    Layers,
    Prune,
    Setting,
)
from gazeguard.models.fingerprint import fingerprint
from gazeguard.models.recognise import Frame, frame_of
from gazeguard.models.target import Encoded, Images, Target
from gazeguard.types import Outcome, Sample

ALPHA = 0.01


class Guard:
    """Judges prompts of one model by where they look, and hides what a trigger put there.

    Made by `Guard.calibrate` or `Guard.load`; used by `watch`.

    Attributes:
        target: the model it was calibrated on.
        setting: what is looked at and hidden, for any model.
        plan: the same in layer numbers of this model.
        detector: distance from clean attention.
        calibration: float64 `(n,)`, ascending scores of the threshold half.
        levels: float64 `(detection layer, head)`, the heads' clean levels (for `widen`, `search`).
        divergences: float64 `(m,)`, ascending, how far clean inputs diverge from the model before
            its fine-tune, nats; None where it is not asked.
        alpha: the promised false-alarm rate, of all witnesses together.
        each: that of one witness.
        threshold: the score above which an input is flagged.
        most_divergent: the divergence above which it is; None like `divergences`.
        spread: lowest and highest threshold over splits of the same samples, or None.
        prompts: of the calibration; None in guards made before they were kept.
        seed: of the split in halves.
        counts: clean samples used for `fit` and `threshold`, and `left_out`.
        fingerprint: of the model, see `models/fingerprint.py`.

    Source: arXiv:2603.12989 (CleanSight); departures in docs/methods/cleansight.md.
    """

    def __init__(self, target: Target, saved: Saved) -> None:
        arrays = saved.arrays
        self.target = target
        self.setting, self.plan = saved.setting, saved.plan
        self.detector = Detector.of(arrays)
        self.calibration, self.levels = arrays["calibration"], arrays["levels"]
        self.alpha, self.seed, self.counts = saved.alpha, saved.seed, saved.counts
        self.fingerprint = saved.fingerprint
        self.divergences = arrays.get("divergence")
        self.each = self.alpha if self.divergences is None else self.alpha / 2
        self.threshold = conformal_threshold(self.calibration, self.each)
        self.most_divergent: float | None = None
        if self.divergences is not None:
            check_switch(target)
            self.most_divergent = conformal_threshold(self.divergences, self.each)
        self.spread, self.prompts = saved.spread, saved.prompts
        self._saved = saved

    def __repr__(self) -> str:
        return (
            f"Guard({self.target.name!r}, layers={list(self.plan.layers)},"
            f" threshold={self.threshold:.4g}, alpha={self.alpha:g},"
            f" calibrated on {sum(self.counts[use] for use in ('fit', 'threshold'))} samples)"
        )

    @classmethod
    def calibrate(
        cls,
        target: Target,
        clean_samples: Iterable[Sample],
        *,
        alpha: float = ALPHA,
        setting: str | Setting = DEFAULT_SETTING,
        layers: Layers | None = None,
        prune: Prune | None = None,
        outliers: Outliers = "refuse",
        witness: Witness = "all",
        batch_size: int = 8,
        seed: int = 0,
        on_skip: OnSkip | None = None,
        progress: Progress | None = None,
    ) -> Guard:
        """Learn what clean inputs look like to a model.

        Half of the samples (less when alpha needs more for the threshold) teach the detector, the
        rest set the threshold. Every clean input that is drawn like them is then flagged with a
        probability of at most `alpha`, on average over calibrations; `rate_bound` in
        `gazeguard.calibrate` says what holds for nearly all of them.

        Args:
            target: the model to be guarded.
            clean_samples: samples like the traffic to come, with images and words, without
                triggers. An alpha of 1 % takes 109, and 800 for a threshold that hardly depends on
                which ones were drawn.
            alpha: the highest acceptable false-alarm rate.
            setting: name of a setting, or one of your own.
            layers: detection layers instead of the setting's.
            prune: pruning rule instead of the setting's.
            outliers: `refuse` samples that stand apart from all others, as poisoned ones would, or
                `keep` them.
            witness: `all` also compares with the model before its fine-tune, where that is at hand
                (a LoRA adapter) and the samples suffice; `attention` does not.
            batch_size: samples per forward pass.
            seed: of the split, and of the harmless changes of `layers="auto"`.
            on_skip: called for a sample that the model cannot take; without it such a sample
                raises.
            progress: called with the number of samples seen.

        Raises:
            UsageError: too few usable samples for this alpha (says which alpha they support),
                samples that stand apart from all others, or an option that does not fit.
            RowError: an unusable sample and no `on_skip`.
            ModelError: the model's attention cannot be read, or the guard does not pass its
                self-check on it (see `selfcheck.py`).
        """
        chosen = resolved(setting, layers, prune)
        if outliers not in get_args(Outliers):
            raise UsageError(f"outliers '{outliers}' is not a choice: give refuse or keep.")
        needed_samples(alpha)  # refuses a bad alpha before anything is measured
        prove(target)
        again = list(clean_samples) if chosen.layers == "auto" else None
        seen = measure(
            target,
            clean_samples if again is None else again,
            layers=wanted(chosen, target),
            batch_size=batch_size,
            earlier=witness == "all" and target.adapter is not None,
            on_skip=on_skip,
            progress=progress,
        )
        if outliers == "refuse":
            refuse_outliers(seen, seed)
        copies = None
        if again is not None:
            copies = changed_ratios(target, again, seen, batch_size, seed)
        return cls.fit(target, seen, alpha=alpha, setting=chosen, seed=seed, copies=copies)

    @classmethod
    def fit(
        cls,
        target: Target,
        seen: Measured,
        *,
        alpha: float = ALPHA,
        setting: str | Setting = DEFAULT_SETTING,
        seed: int = 0,
        copies: NDArray[np.float32] | None = None,
    ) -> Guard:
        """Make a guard of clean samples that were measured already, outlying ones included.

        Args:
            target: the model.
            seen: clean samples with at least the setting's layers.
            alpha: the highest acceptable false-alarm rate.
            setting: name of a setting, or one of your own.
            seed: of the split.
            copies: log ratios `(change, n, layer, head)` of harmlessly changed copies, for
                `layers="auto"`; only those of the fit half are used.

        Raises:
            UsageError, ModelError: as in `calibrate`.
        """
        prove(target)
        return cls(target, fitted(target, seen, alpha, resolved(setting), seed, copies))

    def save(self, folder: str | Path) -> Path:
        """Write `guard.safetensors` and, last, `guard.json` into `folder`; return the folder.

        Raises:
            OSError: the folder cannot be written.
        """
        return write(self._saved, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, target: Target) -> Guard:
        """Read a saved guard.

        Raises:
            UsageError: no guard there, or its files are damaged or of another version.
            ModelError: it was calibrated on another model, adapter or number format, or does not
                pass its self-check on this one.
        """
        saved = read(Path(folder))
        here = fingerprint(target)
        if saved.fingerprint.get("id") != here["id"]:
            raise ModelError(_other_model(Path(folder), saved.fingerprint, here))
        prove(target)
        return cls(target, saved)

    def watch(
        self,
        mode: Mode = "purify",
        *,
        encoded: Encoded | None = None,
        fail_closed: bool = False,
    ) -> Watch:
        """Guard every call of the model inside a `with` block.

        ::

            with guard.watch() as w:
                answer = guard.target.model.generate(**batch)
            w.verdicts  # one per sample of the batch

        Args:
            mode: `purify` hides the trigger's tokens from flagged samples, `detect` only judges,
                `block` raises `RefusedError` right after the prompt was read when a sample is
                flagged.
            encoded: what `target.encode` made of the samples, when that is what the model will be
                called with: then nothing has to be recognised from the token ids.
            fail_closed: also refuse a call with a sample that has an image and could not be
                judged.
        """
        return Watch(self, mode, encoded, fail_closed)

    @property
    def source(self) -> str:
        """Where the threshold comes from, in words."""
        found = f"split conformal on {len(self.calibration)} clean inputs, alpha {self.each:g}"
        if self.divergences is None:
            return found
        return f"{found}, and as much for divergence on {len(self.divergences)}"

    @property
    def rate_bound(self) -> float:
        """The false-alarm rate that 95 % of calibrations like this one keep to."""
        sizes = [len(x) for x in (self.calibration, self.divergences) if x is not None]
        share = (1 - CONFIDENCE) / len(sizes)
        return sum(rate_bound(size, self.each, 1 - share) for size in sizes)

    # What a watch and its sessions ask.

    @cached_property
    def modules(self) -> dict[nn.Module, int]:
        """The target's attention modules and their layers."""
        return self.target.attention_modules

    @cached_property
    def frame(self) -> Frame:
        """The template around prompts, to recognise them by their ids."""
        return frame_of(self.target)

    def judge(self, score: float, unlike: str | None = None) -> GuardVerdict:
        """The verdict of a measured input.

        Args:
            score: its distance from clean ones.
            unlike: from `why_unlike`; such an input is never clean.
        """
        if unlike is not None and score <= self.threshold:
            return self.unjudged(unlike)
        p = self._together(self.calibration, score)
        verdict = judged(
            score, p, self.threshold, self.alpha, self.source, {"model": self.fingerprint["id"]}
        )
        return verdict if unlike is None else verdict.noting(unlike)

    def compare(self, verdict: GuardVerdict, divergence: float) -> GuardVerdict:
        """A verdict by attention with what the model before its fine-tune adds.

        Args:
            verdict: of `judge`.
            divergence: between what the two models are about to say, nats.
        """
        most = self.most_divergent
        if self.divergences is None or most is None or not verdict.applicable:
            return verdict
        if np.isnan(divergence):  # nothing is clean of which a part was not looked at
            return verdict if verdict.outcome is Outcome.FLAGGED else self.unjudged(NOT_COMPARED)
        return verdict.compared(divergence, most, self._together(self.divergences, divergence))

    def _together(self, known: NDArray[np.float64], score: float) -> float:
        """A conformal p-value, times the number of witnesses (Bonferroni)."""
        p = float(p_values(known, [score])[0])
        return min(1.0, p * round(self.alpha / self.each))

    def why_unlike(self, ids: Tensor, kind: Tensor) -> str | None:
        """Why a prompt cannot be compared with those of the calibration; None when it can.

        Args:
            ids: int64 `(position,)`.
            kind: int8 `(position,)` of `KeyKind`.
        """
        return None if self.prompts is None else self.prompts.why_unlike(words_of(ids, kind))

    def unjudged(self, reason: str, *, applicable: bool = True) -> GuardVerdict:
        """The verdict of an input that cannot be judged."""
        return unjudged(
            reason,
            self.threshold,
            self.alpha,
            self.source,
            {"model": self.fingerprint["id"]},
            applicable=applicable,
        )

    def evidence(self, layer: int, weights: Tensor, image: Tensor) -> Tensor:
        """How much each key stands out in a layer; the largest over layers counts.

        Args:
            layer: one where tokens are picked.
            weights: `(sample, head, key)`.
            image: bool `(sample, key)`.

        Returns:
            `(sample, key)`: the strongest head's weight in units of the even share `1/T`, or, for
            `widen` and `search`, of its own clean level.
        """
        share = weights * image.sum(1).clamp_min(1)[:, None, None]
        if self.setting.prune not in LOOKING:
            return share.amax(1)
        level = torch.from_numpy(self.levels[self.plan.layers.index(layer)])
        return (share / level.to(share)[:, None]).amax(1)

    def pick(self, look: Look, image: Tensor, images: Sequence[Images]) -> Tensor:
        """The tokens that stand out in the look that judges, bool `(sample, key)`.

        Args:
            look: that look.
            image: bool `(sample, key)`.
            images: of each sample.
        """
        if self.setting.prune in LOOKING:
            return widest(look.evidence, image, images, 1)
        return above_tau(look.evidence, image, self.setting.prune)

    def hiding(
        self, look: Look, image: Tensor, images: Sequence[Images], flagged: Tensor
    ) -> Hiding:
        """Find the tokens that disarm the flagged samples, with as many looks as that takes.

        Args:
            look: the one that flagged them.
            image: bool `(sample, key)`.
            images: of each sample.
            flagged: bool `(sample,)`, at least one.
        """
        if self.setting.prune == SEARCH:
            return (yield from searching(image, images, flagged, self.threshold))
        if self.setting.prune == WIDEN:
            return (yield from widening(look, image, images, flagged, self.threshold))
        return self.pick(look, image, images) & flagged[:, None]


def _other_model(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    parts = ("weights", "adapter", "dtype", "settings")
    differ = [part for part in parts if _content(theirs.get(part)) != _content(ours[part])]
    return (
        f"the guard in {folder} was calibrated on {theirs.get('model')}, and {ours['model']}"
        f" differs from it in {' and '.join(differ) or 'content'}: calibrate one for this model."
    )


def _content(part: Any) -> Any:
    """A fingerprint's part without paths."""
    if isinstance(part, dict):
        return {name: value for name, value in part.items() if name != "path"}
    return part
