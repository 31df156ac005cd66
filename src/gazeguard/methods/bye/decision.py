"""The decision both rules share: is there a second group of rows, and is it the suspicious one?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gazeguard.signals.bimodality import Fit, Split, split_in_two

Array = NDArray[np.float64]

FEWEST = 8  # rows a group needs, and at least FEWEST_SHARE of the set
FEWEST_SHARE = 0.004


def smallest_share(rows: int, features: int = 0) -> float:
    """The smallest share of poison that a set of this size could have shown, about.

    A direction that is fitted in `features` dimensions uses up as many rows, as for Hotelling's
    test: what is left has to hold the smallest group. Measured draws in docs/methods/bye.md.
    """
    left = rows - features
    return 1.0 if left <= FEWEST else max(FEWEST_SHARE, FEWEST / left)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a group stands apart at one end of a 1-D score.

    Attributes:
        found: a minority group stands apart at the low end.
        why: one sentence, shown to the user.
        split: the fit behind it.
    """

    found: bool
    why: str
    split: Split


def low_group(
    score: Array, *, separation: float, max_share: float, fit: Fit = "gmm", seed: int = 0
) -> Decision:
    """Decide whether the low end of `score` is a group of its own.

    Three guards keep a clean set clean: two Gaussians must beat one (BIC),
    their separation (BSI) must reach `separation`, and the low group must be a minority.

    Args:
        score: float `(N,)`; low means suspicious.
        separation: smallest BSI that counts.
        max_share: largest share of rows that may be called poisoned.
        fit: `gmm`, or `kmeans` (which has no likelihood, so no BIC guard).
        seed: of the fit.
    """
    split = split_in_two(score, fit=fit, seed=seed)
    share = float((split.posterior_low(score) >= 0.5).mean())
    if not split.bsi >= separation:
        return Decision(
            False,
            f"the rows form one group (separation {split.bsi:.2f}, {separation:g} is needed)",
            split,
        )
    if fit == "gmm" and not split.bic_gain > 0:
        return Decision(False, "two groups explain the rows no better than one", split)
    if share > max_share:
        return Decision(
            False,
            f"the low group holds {share:.0%} of the rows, and a suspicious group "
            f"must be a minority of at most {max_share:.0%}",
            split,
        )
    return Decision(True, f"a group of {share:.1%} of the rows stands apart", split)
