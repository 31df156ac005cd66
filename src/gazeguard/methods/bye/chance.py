"""What groups of a size reach by chance: random groups of the set's own rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

DRAWS = 40
SMALL = 30  # members; larger groups by chance stay far below what is asked of any group


def random_groups(group: Bools, pool: Bools, kind: Ints, order: Ints, seed: int) -> Iterator[Bools]:
    """Groups that ask the same kinds of things as `group`, as often, drawn from other rows.

    Rows of one kind of prompt differ from all others together; a group of them does so too,
    whatever its answers say.

    Args:
        group: `(N,)`, stays out of the draws.
        pool: `(N,)` rows to draw from.
        kind: `(N,)` of `PromptKinds`.
        order: of the rows by content, so that their order in the file changes nothing.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    others = order[(pool & ~group)[order]]
    wanted = [(others[kind[others] == k], n) for k, n in enumerate(np.bincount(kind[group]))]
    for _ in range(DRAWS):
        drawn = np.zeros(len(pool), bool)
        for rows, n in wanted:
            drawn[rng.permutation(rows)[:n]] = True
        if (short := int(group.sum() - drawn.sum())) > 0:  # the group is most of its kind
            drawn[rng.permutation(others[~drawn[others]])[:short]] = True
        yield drawn
