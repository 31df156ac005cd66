"""AUROC, F1 and false alarms of a scan over the models of one zoo, or of several together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

RESAMPLES = 500
Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = list[NDArray[np.intp]]


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores and p-values of measured models, and the scores with the base as only reference."""

    score: Array
    p: Array
    base_only: Array

    def part(self, rows: slice) -> Scored:
        """Some of the models."""
        return Scored(self.score[rows], self.p[rows], self.base_only[rows])

    def one(self, place: int) -> dict[str, float]:
        """A single model's numbers, as `together` reads them."""
        names = {"score": self.score, "p_value": self.p, "base_only": self.base_only}
        return {name: float(numbers[place]) for name, numbers in names.items()}


def measures(zoos: Sequence[tuple[Bools, Scored]], alpha: float) -> dict[str, Any]:
    """How well backdoored models are told from benign ones; 95 % intervals.

    Models of different bases are never compared: an AUROC over several zoos is the mean of each
    one's, while flags count together. Intervals of AUROC and F1 are bootstrap intervals over models
    (within each zoo and kind), those of recall and false alarms Wilson's.

    Args:
        zoos: per zoo, which models are backdoored, and their scores.
        alpha: models with a p-value up to it are flagged.

    Returns:
        Every number with `value`, `low`, `high`. `base_only` has the AUROC with the base as the
        only reference, and the best F1 that any threshold could reach there (an upper bound: one
        reference gives no threshold).
    """
    rng = np.random.default_rng(0)
    places = [(np.flatnonzero(~truth), np.flatnonzero(truth)) for truth, _ in zoos]
    draws = [
        [np.concatenate([rng.choice(kind, len(kind)) for kind in kinds]) for kinds in places]
        for _ in range(RESAMPLES)
    ]
    everything = [np.arange(len(truth)) for truth, _ in zoos]

    def interval(function: Callable[[Rows], float]) -> dict[str, float]:
        low, high = np.quantile([function(rows) for rows in draws], [0.025, 0.975])
        return {"value": function(everything), "low": float(low), "high": float(high)}

    def area(rows: Rows, alone: bool) -> float:
        each = [
            auroc(truth[mine], (found.base_only if alone else found.score)[mine])
            for (truth, found), mine in zip(zoos, rows, strict=True)
        ]
        return float(np.mean(each))

    truth = np.concatenate([truth for truth, _ in zoos])
    flagged = np.concatenate([found.p for _, found in zoos]) <= alpha
    starts = np.cumsum([0, *(len(truth) for truth, _ in zoos[:-1])])

    def f1(rows: Rows) -> float:
        at = np.concatenate([start + mine for start, mine in zip(starts, rows, strict=True)])
        return _f1(flagged[at], truth[at])

    best = [
        max(_f1(found.base_only >= limit, kinds) for limit in found.base_only)
        for kinds, found in zoos
    ]
    return {
        "auroc": interval(lambda rows: area(rows, alone=False)),
        "f1": interval(f1),
        "recall": share(flagged[truth]),
        "false_alarms": share(flagged[~truth]),
        "base_only": {
            "auroc": interval(lambda rows: area(rows, alone=True)),
            "best_f1": float(np.mean(best)),
        },
        "benign": int((~truth).sum()),
        "backdoored": int(truth.sum()),
    }


def together(results: Sequence[dict[str, Any]], variant: str, split: str | None) -> dict[str, Any]:
    """`measures` of several zoos' stored results.

    Args:
        results: from `evaluate`.
        variant: `chosen`, `paper` or `shipped`; what was chosen may differ from zoo to zoo.
        split: of the models, or None for all.
    """
    zoos = []
    for result in results:
        models = [model for model in result["models"] if split in (None, model["split"])]
        said = [model["variants"][variant] for model in models]
        score, p, alone = (
            np.array([one[key] for one in said]) for key in ("score", "p_value", "base_only")
        )
        truth = np.array([model["truth"] == "backdoored" for model in models])
        zoos.append((truth, Scored(score, p, alone)))
    return measures(zoos, max(result["alpha"] for result in results))


def auroc(truth: Bools, score: Array) -> float:
    """Share of pairs of a backdoored and a benign model that stand in the right order.

    scikit-learn's takes a millisecond, which thousands of resamples do not have.
    """
    good, bad = np.sort(score[~truth]), score[truth]
    below = np.searchsorted(good, bad, "left") + np.searchsorted(good, bad, "right")
    return float(below.mean() / (2 * len(good)))


def share(happened: Bools) -> dict[str, float]:
    """A share with Wilson's 95 % interval."""
    found = binomtest(int(happened.sum()), len(happened)).proportion_ci(method="wilson")
    return {"value": float(happened.mean()), "low": float(found.low), "high": float(found.high)}


def _f1(said: Bools, truth: Bools) -> float:
    return float(2 * (said & truth).sum() / max(1, said.sum() + truth.sum()))
