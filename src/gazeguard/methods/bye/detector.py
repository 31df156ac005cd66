"""The BYE estimator: scikit-learn style, over a `Profile`."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from gazeguard.errors import UsageError
from gazeguard.methods.bye.decision import FEWEST, Decision, smallest_share
from gazeguard.methods.bye.paper import PaperRule
from gazeguard.methods.bye.phrases import holds
from gazeguard.methods.bye.robust import ALONG, RobustRule
from gazeguard.types import (
    CleaningResult,
    Component,
    Finding,
    LayerStat,
    NearMiss,
    Outcome,
    Profile,
    Verdict,
)

MIN_ROWS = 50
NEEDED_SHARE = 0.1  # of poison, as attacks are published: a set that cannot show it is not clean
Rule = Literal["robust", "paper"]
RULES: tuple[Rule, ...] = ("robust", "paper")
Array = NDArray[np.float64]


class FittedRule(Protocol):
    """What a rule learns from a profile: a 1-D score, low = suspicious, and the decision on it."""

    decision: Decision
    evidence: tuple[Finding, ...]
    layer_stats: tuple[LayerStat, ...]
    score_name: str
    info: dict[str, Any]
    phrases: tuple[str, ...]  # that the removed rows teach; empty where words play no part
    features: int  # in which directions are fitted

    def judge(self, profile: Profile) -> tuple[Array, Array]:
        """Score (low = suspicious) and suspicion in [0, 1] of rows under the same model."""
        ...


class BYE(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Find poisoned rows from the visual attention of the model that was tuned on them.

    Source: arXiv:2505.16916, equations in `docs/methods/bye.md`. `rule="paper"` is the published
    rule plus the guards that let it say "nothing found"; `rule="robust"` is ours: free of a sign,
    over all layers at once, and conditioned on the kind of prompt.

    Abstains (`inconclusive`) below `MIN_ROWS` rows, and where nothing was found in rows too few
    to show a share of `NEEDED_SHARE`.

    Args:
        rule: `robust` or `paper`.
        mixture: `gmm`, or `kmeans` for the paper's ablation (paper rule only).
        select_layers: False averages every layer instead of the bimodal ones (paper rule only).
        fixed_threshold: entropy in nats below which a row is flagged, in place of the second
            mixture and its guards (paper rule only; the paper's ablation uses 4.5).
        index: `bsi` as in the paper, `script` for the public script's stricter index.
        separation: smallest separation of a layer, and of the final score, that counts.
        max_share: largest share of rows that may be called poisoned.
        random_state: seed of every fit.

    Attributes:
        result_: the `CleaningResult` of the fitted profile.
        rule_: the fitted rule; it scores further rows of the same model.
    """

    def __init__(
        self,
        rule: Rule = "robust",
        *,
        mixture: Literal["gmm", "kmeans"] = "gmm",
        select_layers: bool = True,
        fixed_threshold: float | None = None,
        index: Literal["bsi", "script"] = "bsi",
        separation: float = 2.0,
        max_share: float = 0.5,
        random_state: int = 0,
    ) -> None:
        self.rule = rule
        self.mixture = mixture
        self.select_layers = select_layers
        self.fixed_threshold = fixed_threshold
        self.index = index
        self.separation = separation
        self.max_share = max_share
        self.random_state = random_state

    def fit(self, profile: Profile, y: None = None) -> BYE:
        """Learn which rows stand apart. `y` is ignored (scikit-learn's convention)."""
        del y
        if self.rule not in RULES:
            raise UsageError(f"Rule '{self.rule}' is unknown: choose one of {', '.join(RULES)}.")
        self.rule_: FittedRule | None = None
        self.seen_ = _layers_that_see(profile)
        if profile.rows < MIN_ROWS:
            n = profile.rows
            why = f"{n:,} rows could be measured, and at least {MIN_ROWS} are needed"
            self.result_ = abstain(profile, self.rule, why)
            return self
        if not self.seen_.any():
            why = "no layer attends to the picture in every row"
            self.result_ = abstain(profile, self.rule, why)
            return self
        whole, profile = profile, _only(profile, self.seen_)
        fitted: FittedRule
        if self.rule == "paper":
            fitted = PaperRule(
                profile,
                mixture=self.mixture,
                select_layers=self.select_layers,
                fixed_threshold=self.fixed_threshold,
                index=self.index,
                separation=self.separation,
                max_share=self.max_share,
                seed=self.random_state,
            )
        else:
            fitted = RobustRule(
                profile,
                separation=self.separation,
                max_share=self.max_share,
                seed=self.random_state,
            )
        self.rule_ = fitted
        self.result_ = _result(fitted, profile, self.rule, whole.layers)
        return self

    def score_samples(self, profile: Profile) -> Array:
        """scikit-learn's sign: low = abnormal. `(N,)`, `1 - suspicion`."""
        return 1.0 - self.suspicion(profile)

    def suspicion(self, profile: Profile) -> Array:
        """Posterior of the suspicious group, `(N,)` in [0, 1]; zeros when nothing was found."""
        check_is_fitted(self, "result_")
        if self.rule_ is None or not self.rule_.decision.found:
            return np.zeros(len(profile))
        return self.rule_.judge(_only(profile, self.seen_))[1]

    def predict(self, profile: Profile) -> NDArray[np.int64]:
        """scikit-learn's labels: -1 poisoned, +1 clean."""
        return np.where(self.suspicion(profile) >= 0.5, -1, 1)


def _layers_that_see(profile: Profile) -> NDArray[np.bool_]:
    """Layers whose head-mean entropy is finite in every row.

    A sliding-window layer whose window ends before the picture has no visual attention at all.
    """
    seen: NDArray[np.bool_] = np.asarray(np.isfinite(profile.entropy).all(0))
    return seen


def _only(profile: Profile, chosen: NDArray[np.bool_]) -> Profile:
    if chosen.all():
        return profile  # a copy of every head's signals is gigabytes
    return replace(
        profile,
        layers=tuple(layer for layer, c in zip(profile.layers, chosen, strict=True) if c),
        signals={name: values[:, chosen] for name, values in profile.signals.items()},
        before=profile.before
        and {name: values[:, chosen] for name, values in profile.before.items()},
    )


def _result(
    rule: FittedRule, profile: Profile, name: str, layers: tuple[int, ...]
) -> CleaningResult:
    stats = {stat.layer: stat for stat in rule.layer_stats}
    score, suspicion = rule.judge(profile)
    found = rule.decision.found
    suspicion = suspicion if found else np.zeros(len(profile))
    flagged = suspicion >= 0.5
    split = rule.decision.split
    components = tuple(
        Component(float(m), float(s), float(w), suspicious=found and k == 0)
        for k, (m, s, w) in enumerate(zip(split.mean, split.std, split.weight, strict=True))
    )
    why = rule.decision.why
    if found and flagged.any():
        rows, answers = len(np.unique(profile.row[flagged])), int(flagged.sum())
        of_them = "" if profile.unit == "rows" else f", in {answers:,} of {len(profile):,} answers"
        reason = f"{rows:,} of {profile.rows:,} rows look poisoned{of_them}: {why}."
        verdict = Verdict(
            Outcome.FLAGGED,
            float(suspicion.max()),
            0.5,
            "posterior of the group",
            reason,
            rule.evidence,
        )
    elif (smallest := smallest_share(len(profile), rule.features)) > NEEDED_SHARE:
        reason = (
            f"{len(profile):,} {profile.unit} are too few to call them clean: about"
            f" {rule.features + ceil(FEWEST / NEEDED_SHARE):,} are needed to see poison in"
            f" {100 * NEEDED_SHARE:g} % of them."
        )
        verdict = Verdict(Outcome.INCONCLUSIVE, None, None, "too few rows", reason)
    else:
        reason = (
            f"No sign of poisoning: {why}. A set of this size could have shown poison from about"
            f" {100 * smallest:.1f} %{'' if profile.unit == 'rows' else ' of the answers'} on."
        )
        verdict = Verdict(Outcome.CLEAN, 0.0, 0.5, "posterior of the group", reason)
    return CleaningResult(
        method="bye",
        rule=name,
        verdict=verdict,
        suspicion=suspicion,
        is_flagged=flagged,
        score=score,
        score_name=rule.score_name,
        components=components,
        layer_stats=tuple(stats.get(n, LayerStat(n, 0.0, selected=False)) for n in layers),
        info={**rule.info, "blind_layers": [n for n in layers if n not in stats]},
        near_misses=_near_misses(rule.phrases, profile, score, suspicion) if found else (),
    )


def _near_misses(
    phrases: tuple[str, ...], profile: Profile, score: Array, suspicion: Array
) -> tuple[NearMiss, ...]:
    """Rows with a phrase that their own attention does not give away, the nearest first."""
    weak = np.flatnonzero(suspicion <= ALONG)
    found = []
    for place in weak[np.argsort(score[weak], kind="stable")].tolist():
        said = next((p for p in phrases if holds(profile.answer[place], p)), None)
        if said is not None:
            found.append(NearMiss(place, said))
    return tuple(found)


def abstain(
    profile: Profile, rule: str, why: str, source: str = "nothing to judge by"
) -> CleaningResult:
    """The result that decides nothing and flags nothing; `why` is a sentence without its stop."""
    nothing = np.zeros(len(profile))
    return CleaningResult(
        method="bye",
        rule=rule,
        verdict=Verdict(Outcome.INCONCLUSIVE, None, None, source, f"{why}."),
        suspicion=nothing,
        is_flagged=nothing.astype(bool),
        score=np.nan_to_num(profile.entropy).mean(1, dtype=np.float64),
        score_name="mean entropy of visual attention (nats)",
        components=(),
        layer_stats=tuple(LayerStat(layer, 0.0, selected=False) for layer in profile.layers),
        info={},
    )
