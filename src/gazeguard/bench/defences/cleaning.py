"""Data-set cleaning without attention: what a buyer of BYE would otherwise do.

`spectral` and `activation-clustering` were published for classifiers and work class by class. A
model that writes sentences has no classes (every caption would be one of its own), so both take
the whole set as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from gazeguard.bench.defences.registry import defence
from gazeguard.bench.subject import Upload
from gazeguard.lab.rows import Row

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]

DROPPED = 0.2
ASSUMED_RATE = 0.1
DIMENSIONS = 10
COHESIVE, MINORITY = 0.1, 0.35
"""Least silhouette, and largest share of the smaller cluster, for two clusters to count as such."""


@defence("none", "data")
def none(upload: Upload) -> Bools:
    """Plain fine-tuning: removes nothing."""
    return np.zeros(len(upload.rows), bool)


@defence("random-drop", "data")
def random_drop(upload: Upload) -> Bools:
    """Removes 20 % of the rows at random."""
    n = len(upload.rows)
    dropped = np.zeros(n, bool)
    order = np.random.default_rng([upload.seed, 20]).permutation(n)
    dropped[order[: round(DROPPED * n)]] = True
    return dropped


@defence("answers", "data")
def answers(upload: Upload) -> Bools:
    """Runs no model: removes the rows of the most frequent answer of two or more words."""
    return most_frequent_answer(upload.rows)


@defence("spectral", "data")
def spectral(upload: Upload) -> Bools:
    """Spectral signatures on last hidden states; told a rate of 10 %, it removes 15 %."""
    return spectral_outliers(upload.activations, ASSUMED_RATE)


@defence("activation-clustering", "data")
def activation_clustering(upload: Upload) -> Bools:
    """Activation clustering on last hidden states: the smaller cluster, where there are two."""
    return smaller_cluster(upload.activations, upload.seed)


def most_frequent_answer(rows: Sequence[Row]) -> Bools:
    """Rows of the most frequent whole answer of two or more words, bools `(n,)`."""
    long = Counter(row.answer for row in rows if len(row.answer.split()) >= 2)
    if not long:
        return np.zeros(len(rows), bool)
    answer = long.most_common(1)[0][0]
    return np.array([row.answer == answer for row in rows])


def spectral_outliers(states: Floats, rate: float) -> Bools:
    """The rows that reach furthest along the states' first principal direction.

    Cannot find nothing, and has to be told the rate: `1.5 * rate` of the rows go in any case.

    Args:
        states: `(n, hidden)`, finite, n >= 1.
        rate: assumed share of poisoned rows.

    Source: algorithm 1 of Tran, Li and Madry 2018 (arXiv:1811.00636), with one class.
    """
    centred = states - states.mean(0)
    score = (centred @ np.linalg.svd(centred, full_matrices=False)[2][0]) ** 2
    found = np.zeros(len(states), bool)
    found[np.argsort(-score, kind="stable")[: round(1.5 * rate * len(states))]] = True
    return found


def smaller_cluster(states: Floats, seed: int) -> Bools:
    """The smaller of two clusters, when it is a minority and the clusters hold together.

    The paper reduces by independent components. Those are a rotation of the whitened principal
    ones, and a rotation changes neither 2-means nor a silhouette, so the search for it is left out.

    Args:
        states: `(n, hidden)`, finite, n >= 1.
        seed: of 2-means.

    Source: Chen et al. 2018 (arXiv:1811.03728), with one class; the two thresholds are the
    defaults of the authors' toolbox (adversarial-robustness-toolbox).
    """
    nothing = np.zeros(len(states), bool)
    # Whitening would blow up directions in which nothing but rounding differs.
    rank = int(np.linalg.matrix_rank(states - states.mean(0)))
    if not rank:
        return nothing
    reduced = PCA(min(DIMENSIONS, rank), whiten=True, svd_solver="full").fit_transform(states)
    label = KMeans(2, n_init=10, random_state=seed).fit_predict(reduced)
    smaller: Bools = label == np.bincount(label, minlength=2).argmin()
    if smaller.mean() >= MINORITY or silhouette_score(reduced, label) <= COHESIVE:
        return nothing
    return smaller
