"""Make rows comparable: what a row's attention is, beyond what its prompt alone explains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import Ridge

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

MAX_FEATURES = 256  # keeps 100,000 rows of a 32 x 32 head model within 100 MB
SAMPLE = 20_000  # rows that a projection or a regression is fitted on
KIND_ROWS = 60  # that a kind of prompt should have
CLIP = 8.0  # robust standard deviations; beyond that, more says nothing more


class PromptKinds:
    """Words of the prompts, and a coarse clustering of them into kinds of question.

    A picture is looked at in another way after some talk than at first, so the same question as a
    second and as a first one are two kinds.

    Args:
        prompts: the users' words, `N` of them.
        turn: `(N,)` of `Profile`.
        most: largest number of clusters.
        seed: of the clustering.

    Attributes:
        clusters: number of clusters; a kind's number modulo this is its cluster.
    """

    def __init__(self, prompts: Sequence[str], turn: Ints, *, most: int = 8, seed: int = 0) -> None:
        self._turns = common_turns(turn)
        self.clusters = 1
        different = len(set(prompts))
        self._words: CountVectorizer | None = None
        if different == 1:
            return
        words = CountVectorizer(
            token_pattern=r"\w+", binary=True, max_features=256, min_df=max(2, len(prompts) // 200)
        )
        try:
            found = words.fit_transform(prompts).astype(np.float32)
        except ValueError:  # no word is frequent enough: nothing to condition on
            return
        self._words = words
        self.clusters = max(1, min(most, different, len(prompts) // KIND_ROWS))
        self._clusters = MiniBatchKMeans(
            self.clusters, n_init=5, batch_size=4096, random_state=seed
        )
        self._clusters.fit(found)

    def __call__(self, prompts: Sequence[str], turn: Ints) -> tuple[Floats, Ints]:
        """Binary word features `(N, words)` and the kind `(N,)` of each prompt."""
        later = self.clusters * place_of_turn(turn, self._turns)
        if self._words is None:
            return np.zeros((len(prompts), 0), np.float32), later
        found = self._words.transform(prompts).astype(np.float32)
        return found.toarray(), self._clusters.predict(found).astype(np.int64) + later


def common_turns(turn: Ints) -> Ints:
    """Turns that enough answers have to be compared among themselves; the others join the last.

    Returns:
        The first turn of each group, ascending.
    """
    turns, counts = np.unique(turn, return_counts=True)
    first: Ints = turns[(counts >= KIND_ROWS) | (turns == turns[0])].astype(np.int64)
    return first


def place_of_turn(turn: Ints, first: Ints) -> Ints:
    """Which group of `common_turns` each answer is in, `(N,)`."""
    found: Ints = np.searchsorted(first, turn, "right") - 1
    return found.clip(0)


class Conditioned:
    """Attention features with the part that the prompt explains taken out.

    Standardised signals minus a ridge regression on the prompt's words, then centred and scaled
    (median, MAD shrunk towards that of all rows) within each kind of prompt.

    Args:
        signals: name -> `(N, L)` or `(N, L, H)`, finite.
        image_tokens: `(N,)`; entropies are taken relative to `ln T`.
        words: `(N, words)` of `PromptKinds`.
        kind: `(N,)` of `PromptKinds`.
        seed: of the projection and of the rows that it is fitted on.
    """

    def __init__(
        self,
        signals: dict[str, Floats],
        image_tokens: Ints,
        words: Floats,
        kind: Ints,
        seed: int = 0,
    ) -> None:
        raw = _features(signals, image_tokens)
        n = len(raw)
        rng = np.random.default_rng(seed)
        some = np.sort(rng.permutation(n)[:SAMPLE])
        self._center = raw[some].mean(0)
        self._scale = raw[some].std(0) + 1e-6
        self._pca: PCA | None = None
        if raw.shape[1] > MAX_FEATURES:
            self._pca = PCA(min(MAX_FEATURES, len(some) - 1), random_state=seed)
            self._pca.fit((raw[some] - self._center) / self._scale)
        x = self._project(raw)
        self._ridge: Ridge | None = None
        if words.shape[1]:
            self._ridge = Ridge(alpha=3.0).fit(words[some], x[some])
            x -= self._ridge.predict(words)
        self._kinds = []
        spread = _mad(x[some]) + 1e-6
        for number in range(int(kind.max()) + 1):
            rows = x[kind == number]
            if not len(rows):
                self._kinds.append((np.zeros(x.shape[1], np.float32), spread))
                continue
            trust = len(rows) / (len(rows) + 30)
            own: Floats = np.asarray(trust * _mad(rows) + (1 - trust) * spread, np.float32)
            self._kinds.append((np.median(rows, 0), own + 1e-6))

    def __call__(
        self, signals: dict[str, Floats], image_tokens: Ints, words: Floats, kind: Ints
    ) -> Floats:
        """Conditioned features `(N, D)`, D at most `MAX_FEATURES`, clipped to +-8."""
        x = self._project(_features(signals, image_tokens))
        if self._ridge is not None:
            x -= self._ridge.predict(words)
        for number, (middle, spread) in enumerate(self._kinds):
            rows = kind == number
            x[rows] = (x[rows] - middle) / spread
        return x.clip(-CLIP, CLIP)

    def _project(self, raw: Floats) -> Floats:
        if self._pca is None:
            plain: Floats = ((raw - self._center) / self._scale).astype(np.float32)
            return plain
        parts = [
            self._pca.transform((raw[i : i + SAMPLE] - self._center) / self._scale)
            for i in range(0, len(raw), SAMPLE)
        ]
        return np.concatenate(parts).astype(np.float32)


def only_finite(signals: dict[str, Floats]) -> dict[str, Floats]:
    """The signals that are finite in every row; a head may give the image no mass at all."""
    return {name: v for name, v in signals.items() if np.isfinite(v).all()}


def _features(signals: dict[str, Floats], image_tokens: Ints) -> Floats:
    """`(N, features)`: entropies relative to uniform attention, masses as log odds."""
    n = len(image_tokens)
    columns = []
    for name, values in signals.items():
        flat = values.reshape(n, -1)
        if name.endswith("entropy"):
            columns.append(flat - np.log(image_tokens.clip(2))[:, None].astype(np.float32))
        else:
            columns.append(np.log((flat + 1e-4) / (1 - flat + 1e-4)))
    return np.concatenate(columns, 1).astype(np.float32)


def _mad(x: Floats) -> Floats:
    """Median absolute deviation per column, in standard deviations of a Gaussian."""
    spread = np.median(np.abs(x - np.median(x, 0)), 0)
    return (1.4826 * spread).astype(np.float32)
