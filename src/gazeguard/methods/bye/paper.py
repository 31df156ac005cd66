"""The published rule (arXiv:2505.16916): bimodal layers, their mean entropy, the low group."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.methods.bye.conditioning import common_turns, place_of_turn
from gazeguard.methods.bye.decision import Decision, low_group
from gazeguard.signals.bimodality import Fit, Split, split_in_two
from gazeguard.types import Finding, LayerStat, Profile

Array = NDArray[np.float64]


class PaperRule:
    """Steps 3 and 4 of the paper on a profile; see `BYE` for the arguments.

    Where we depart: the second mixture must pass the guards of `low_group`, so that a clean set
    loses nothing (the public script always removes a cluster). The paper measures one answer per
    row; entropies of later ones are moved so that every turn has the first one's medians.
    """

    score_name = "mean entropy of the selected layers (nats)"
    phrases: tuple[str, ...] = ()
    features = 0

    def __init__(
        self,
        profile: Profile,
        *,
        mixture: Fit,
        select_layers: bool,
        fixed_threshold: float | None,
        index: str,
        separation: float,
        max_share: float,
        seed: int,
    ) -> None:
        self._turns = common_turns(profile.turn)
        place = place_of_turn(profile.turn, self._turns)
        medians = np.stack(
            [np.median(profile.entropy[place == k], 0) for k in range(len(self._turns))]
        )
        self._moved = medians - medians[0]
        entropy = self._entropy(profile)
        splits = [split_in_two(column, fit=mixture, seed=seed) for column in entropy.T]
        found = [s.script_bsi if index == "script" else s.bsi for s in splits]
        chosen = [not select_layers or b >= separation for b in found]
        self.layer_stats = tuple(
            LayerStat(layer, float(b), selected=c)
            for layer, b, c in zip(profile.layers, found, chosen, strict=True)
        )
        self._chosen = np.flatnonzero(chosen)
        self._threshold = fixed_threshold
        if len(self._chosen) == 0:
            best = int(np.argmax(found))
            why = (
                f"no layer splits the rows in two (best separation {found[best]:.2f} in layer "
                f"{profile.layers[best]}, {separation:g} is needed)"
            )
            self.decision = Decision(False, why, splits[best])
            self._chosen = np.arange(len(found))
        else:
            self.decision = low_group(
                self._mean(profile),
                separation=separation,
                max_share=max_share,
                fit=mixture,
                seed=seed,
            )
        if fixed_threshold is not None:
            self.decision = _below(self._mean(profile), fixed_threshold, self.decision.split)
        split = self.decision.split
        self.evidence: tuple[Finding, ...] = (
            Finding(
                f"Two groups fit the rows better than one; their separation is {split.bsi:.2f}.",
                {"separation": split.bsi, "bic_gain": split.bic_gain},
            ),
        )
        self.info: dict[str, Any] = {
            "selected_layers": [profile.layers[i] for i in np.flatnonzero(chosen)],
            "layer_means": [s.mean.tolist() for s in splits],
            "layer_stds": [s.std.tolist() for s in splits],
            "layer_weights": [s.weight.tolist() for s in splits],
            "bsi_threshold": separation,
            "bsi_threshold_source": f"{index} of arXiv:2505.16916",
        }

    def judge(self, profile: Profile) -> tuple[Array, Array]:
        """Mean entropy of the selected layers, and the posterior of its low component.

        The posterior is a step at the fixed threshold where one is set.
        """
        score = self._mean(profile)
        if self._threshold is not None:
            return score, (score < self._threshold).astype(np.float64)
        return score, self.decision.split.posterior_low(score)

    def _mean(self, profile: Profile) -> Array:
        mean: Array = self._entropy(profile)[:, self._chosen].mean(1)
        return mean

    def _entropy(self, profile: Profile) -> Array:
        """float64 `(N, L)`, comparable over turns."""
        moved = self._moved[place_of_turn(profile.turn, self._turns)]
        entropy: Array = profile.entropy.astype(np.float64) - moved
        return entropy


def _below(score: Array, threshold: float, split: Split) -> Decision:
    share = float((score < threshold).mean())
    why = f"{share:.1%} of the rows lie below {threshold:g} nats"
    return Decision(share > 0, why, split)
