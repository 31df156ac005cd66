"""Our rule: rows that teach the same words and that the tuned model looks at in a new way.

A backdoor ties a trigger to something that the model shall say. So the poisoned rows share words in
their answers, and once the model has learnt the trigger it looks at these rows differently from
others that ask the same kind of thing. Neither is enough by itself: clean rows share words too
("yes"), and clean rows that share words show similar things and are looked at alike ("... at the
top left"). But that second likeness is there before the fine-tune as well. Hence, for every phrase:

1. a linear discriminant between the rows that hold the phrase and the others, on attention features
   of all layers and heads with the prompt's part taken out (`conditioning.py`), cross-validated;
2. a mixture of "like the others" and "shifted" inside the group: a group may be part clean. Where
   no phrase stands out as a whole, the part is looked for along the direction in which the
   phrase's rows spread most beyond all rows: a target such as "yes" hides among honest rows, and
   their mean says nothing, but their spread does;
3. its separation (BSI), less two standard errors, must be `GROWTH` times what the same rows have
   under the model before its fine-tune, and `GAINED` times 2 above that. Without that model it must
   reach 2, and the phrase must turn up over most kinds of prompt and stand out from every other.

No layer, head or sign is chosen beforehand. `docs/methods/bye.md` says what this cannot see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import nsmallest
from itertools import count
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm, t

from gazeguard.methods.bye.chance import SMALL, random_groups
from gazeguard.methods.bye.conditioning import SAMPLE, Conditioned, PromptKinds, only_finite
from gazeguard.methods.bye.decision import FEWEST, FEWEST_SHARE, Decision
from gazeguard.methods.bye.discriminant import FOLDS, Space, middle_and_spread
from gazeguard.methods.bye.phrases import holds, shared_phrases
from gazeguard.signals.bimodality import Split, split_in_two
from gazeguard.types import Finding, LayerStat, Profile

Array = NDArray[np.float64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

GROWTH = 2.0  # times the separation before the fine-tune
GAINED = 0.75  # of the separation that is asked for must be new since then
STANDS_OUT = 1.5  # without the model before: times the separation of the next best phrase
SCANNED = 24  # phrases that get a cross-validated look, best first
MAX_GROUPS = 5  # targets one attacker may plant
OWNED = 0.9  # of a phrase's rows in the group: who plants a target seldom shares it
ALONG = 0.5  # suspicion of rows that only their words give away


@dataclass(slots=True)
class Group:
    """One phrase and how its rows are looked at.

    Attributes:
        phrase: the shared words.
        named: `(N,)` rows that hold them.
        members: `(N,)` rows of the phrase that are shifted.
        separation: BSI of members against all others under the tuned model.
        before: the same under the model before its fine-tune; None without that model.
        coverage: share of the set that lies in kinds of prompt where members turn up.
        is_part: the phrase's other rows are honest.
        chance: what random groups of this size gained at most; None where nobody asked.
    """

    phrase: str
    named: Bools
    members: Bools
    separation: float
    before: float | None
    coverage: float
    is_part: bool
    chance: float | None = None

    @property
    def at_least(self) -> float:
        """`separation` less two of its standard errors (delta method; the members are few).

        Less three for a part, which was picked out of many. The errors are Student's: how much the
        members spread is known the worse, the fewer they are.
        """
        n = max(2, int(self.members.sum()))
        error = float(np.sqrt(0.5 / n + self.separation**2 / (4 * n)))
        return self.separation - float(t.isf(norm.sf(3 if self.is_part else 2), n - 1)) * error

    def asked(self, separation: float) -> float:
        """What `at_least` must reach."""
        if self.before is None:
            return separation
        return max(GROWTH * self.before, self.before + GAINED * separation)

    @property
    def gained(self) -> float:
        """How much of `separation` is new since the fine-tune."""
        return self.separation - (self.before or 0.0)


class RobustRule:
    """Fit on a profile; see the module's docstring and `BYE` for the arguments."""

    def __init__(self, profile: Profile, *, separation: float, max_share: float, seed: int) -> None:
        profile = _at_most(profile, SAMPLE)  # judges every row, learns from these
        n = len(profile)
        self._prompts = PromptKinds(profile.prompt, profile.turn, seed=seed)
        words, kind = self._prompts(profile.prompt, profile.turn)
        question = kind % self._prompts.clusters
        self._names = sorted(only_finite(profile.signals))
        self._tuned = Conditioned(self._signals(profile), profile.image_tokens, words, kind, seed)
        fold = _folds(profile, seed)
        x = self._tuned(self._signals(profile), profile.image_tokens, words, kind)
        space = Space(x, fold)
        base = _base_space(profile, words, kind, fold, seed)
        phrases, held = shared_phrases(
            profile.answer, max(FEWEST, round(FEWEST_SHARE * n)), round(0.7 * n)
        )
        order = np.argsort(np.asarray(profile.sample_id), kind="stable")
        free = np.ones(n, bool)
        self.groups: list[Group] = []
        seen: list[Group] = []
        for _ in range(MAX_GROUPS):
            room = max_share * n - (~free).sum()
            ranked = _ranked(space, base, held, free)
            look = partial(_looks, space, base, phrases, held, question, free, ranked)
            seen = [*look(parts=False)]
            chance = partial(_by_chance, space, base, free, kind, order, seed)
            best = _best(seen, separation, room, base is not None, chance)
            if best is None and not self.groups:
                seen += look(parts=True)
                best = _best(seen, separation, room, base is not None, chance)
            if best is None:
                break
            self.groups.append(best)
            free &= ~best.members
        self._heads = [_Head(space, g, _holding(phrases, held, g.phrase)) for g in self.groups]
        shown = self.groups or sorted(seen, key=lambda g: -g.gained)[:1]
        self._axis = self._heads[0] if self._heads else _plain_axis(space, shown)
        score, suspicion = self.judge(profile)
        found = bool((suspicion >= 0.5).any())
        self.decision = Decision(
            found, _why(self.groups, shown, separation, base is not None), self._axis.split(score)
        )
        self.score_name = (
            f"distance from the other rows, away from those that say “{shown[0].phrase}”"
            " (standard deviations)"
            if shown
            else "distance from the other rows (standard deviations)"
        )
        self.phrases = tuple(g.phrase for g in self.groups)
        self.features = x.shape[1]
        self.evidence = tuple(
            Finding(
                f"{int(g.members.sum()):,} {profile.unit} teach “{g.phrase}”: {_figures(g)}.",
                _as_json(g, separation),
            )
            for g in self.groups
        )
        self.layer_stats = _layer_stats(profile, self.groups, seed)
        self.info: dict[str, Any] = {
            "groups": [_as_json(g, separation) for g in self.groups],
            "next_best": [
                _as_json(g, separation) for g in sorted(seen, key=lambda g: -g.gained)[:5]
            ],
            "phrases": len(phrases),
            "prompt_kinds": int(kind.max()) + 1,
            "model_before": base is not None,
            "separation_asked": _needed(separation, base is not None),
            "separation_threshold": separation,
            "separation_threshold_source": "BSI >= 2, arXiv:2505.16916",
        }

    def judge(self, profile: Profile) -> tuple[Array, Array]:
        """Score (low = suspicious) and suspicion of any rows measured under the same model."""
        parts = [
            self._judge(_part(profile, slice(i, i + SAMPLE)))
            for i in range(0, max(1, len(profile)), SAMPLE)
        ]
        scores, suspicions = zip(*parts, strict=True)
        return np.concatenate(scores), np.concatenate(suspicions)

    def _judge(self, profile: Profile) -> tuple[Array, Array]:
        words, kind = self._prompts(profile.prompt, profile.turn)
        x = self._tuned(self._signals(profile), profile.image_tokens, words, kind)
        suspicion = np.zeros(len(profile))
        for head in self._heads:
            holding = {a for a in set(profile.answer) if holds(a, head.phrase)}
            named = np.array([answer in holding for answer in profile.answer], bool)
            suspicion = np.maximum(suspicion, np.where(named, head.posterior(x), 0.0))
        return -self._axis.position(x), suspicion

    def _signals(self, profile: Profile) -> dict[str, Floats]:
        return {name: profile.signals[name] for name in self._names}


def _at_most(profile: Profile, most: int) -> Profile:
    """A part of the rows chosen by their content; the same rows in whatever order they come."""
    if len(profile) <= most:
        return profile
    first = nsmallest(most, zip(profile.sample_id, count(), strict=False))
    return _part(profile, np.sort([place for _, place in first]))


def _part(profile: Profile, rows: slice | NDArray[np.int64]) -> Profile:
    def some(texts: Sequence[str]) -> Sequence[str]:
        return texts[rows] if isinstance(rows, slice) else [texts[i] for i in rows.tolist()]

    return replace(
        profile,
        row=profile.row[rows],
        turn=profile.turn[rows],
        sample_id=some(profile.sample_id),
        prompt=some(profile.prompt),
        answer=some(profile.answer),
        image_tokens=profile.image_tokens[rows],
        signals={name: values[rows] for name, values in profile.signals.items()},
        before=profile.before and {name: values[rows] for name, values in profile.before.items()},
    )


class _Head:
    """One accepted group as a function of new rows."""

    def __init__(self, space: Space, group: Group, named: Bools) -> None:
        others = ~(group.members if group.is_part else named)
        self.phrase = group.phrase
        self._way = space.direction(group.members, others)
        # Honest rows of the phrase are what a part has to be told from.
        like = named & others if group.is_part else others
        self._middle, self._spread = middle_and_spread(space.x[like] @ self._way)
        self._share, self._mean, self._std = _mixture(self.position(space.x[named]))
        self._weight = float(group.members.mean())
        # The phrase is the attacker's: its other rows are the likeliest to hide a trigger too.
        self._all = not group.is_part and group.members.sum() >= OWNED * named.sum()

    def position(self, x: Floats) -> Array:
        """Standard deviations away from the other rows, `(N,)`; high = suspicious."""
        found: Array = (x @ self._way - self._middle) / self._spread
        return found

    def posterior(self, x: Floats) -> Array:
        """Posterior of "shifted" among the rows that hold the phrase.

        Where the phrase is nearly the group's own, a row goes along unless it lies on the other
        side of the others' middle: a trigger that the model missed leaves little to see.
        """
        along = self.position(x)
        found = _posterior(along, self._share, self._mean, self._std)
        return np.where(self._all & (along > 0), found.clip(ALONG), found)

    def split(self, score: Array) -> Split:
        """The two groups over all rows, for the report."""
        mean, std = np.array([-self._mean, 0.0]), np.array([self._std, 1.0])
        weight = np.array([self._weight, 1 - self._weight])
        return Split(mean, std, weight, split_in_two(score).bic_gain)


class _Axis:
    """Where nothing was found: the most telling direction, or the first principal one."""

    def __init__(self, way: Array) -> None:
        self.way = way

    def position(self, x: Floats) -> Array:
        along = x @ self.way
        middle, spread = middle_and_spread(along)
        found: Array = (along - middle) / spread
        return found

    def split(self, score: Array) -> Split:
        return split_in_two(score)


def _plain_axis(space: Space, shown: list[Group]) -> _Axis:
    if shown and shown[0].members.any():
        return _Axis(space.direction(shown[0].members, ~shown[0].members))
    return _Axis(np.eye(space.x.shape[1])[0])


def _base_space(
    profile: Profile, words: Floats, kind: NDArray[np.int64], fold: NDArray[np.int64], seed: int
) -> Space | None:
    if profile.before is None:
        return None
    signals = only_finite(profile.before)
    if not signals:
        return None
    made = Conditioned(signals, profile.image_tokens, words, kind, seed)
    return Space(made(signals, profile.image_tokens, words, kind), fold)


def _folds(profile: Profile, seed: int) -> NDArray[np.int64]:
    """Fold of each row, from its content: the order of the rows changes nothing."""
    return np.array([crc32(i.encode()) + seed for i in profile.sample_id], np.int64) % FOLDS


def _ranked(space: Space, base: Space | None, held: Any, free: Bools) -> list[int]:
    """The phrases whose rows differ most from the rest, and did not before; columns of `held`."""
    inside = np.asarray(held[free].sum(0)).ravel()
    if not len(inside):
        return []
    worth = inside * space.distance(held, free, inside)
    if base is not None:
        worth -= inside * base.distance(held, free, inside)
    worth[inside < FEWEST] = -np.inf
    first = np.argsort(-worth, kind="stable")[:SCANNED]
    return [int(column) for column in first if np.isfinite(worth[column])]


def _looks(
    space: Space,
    base: Space | None,
    phrases: list[str],
    held: Any,
    question: NDArray[np.int64],
    free: Bools,
    ranked: list[int],
    *,
    parts: bool,
) -> Iterator[Group]:
    """A cross-validated look at each of the ranked phrases, as a whole or for a part of it."""
    for column in ranked:
        named = _holding(phrases, held, phrases[column]) & free
        members = _far_out(space, named) if parts else named
        if members.sum() >= FEWEST:
            yield _look(space, base, phrases[column], named, members, free, question, parts)


def _far_out(space: Space, named: Bools) -> Bools:
    """The rows of a phrase that lie far out where its rows spread most."""
    along = space.widest(named)
    inside = along[named]
    if ((inside - inside.mean()) ** 3).sum() < 0:  # the far end of a minority
        along, inside = -along, -inside
    found: Bools = named & (_posterior(along, *_mixture(inside)) >= 0.5)
    return found


def _look(
    space: Space,
    base: Space | None,
    phrase: str,
    named: Bools,
    members: Bools,
    free: Bools,
    question: NDArray[np.int64],
    is_part: bool,
) -> Group:
    """How far the members, or the rows of the phrase that are like them, stand apart."""
    others = free & ~(members if is_part else named)
    for _ in range(2):  # a group that is part clean blurs its own direction: look twice
        scores = space.scores(members, others)
        share, mean, std = _mixture(scores[named])
        shifted = named & (_posterior(scores, share, mean, std) >= 0.5)
        if shifted.sum() < FEWEST:
            break
        members = shifted
        others = free & ~(members if is_part else named)
    scores = space.scores(members, others)
    before = None
    if base is not None:
        before = _separation(base.scores(members, others), members, others)
    typical = members.mean()
    covered = sum(
        (question == k).mean()
        for k in np.unique(question)
        if members[question == k].mean() >= typical / 4
    )
    found = _separation(scores, members, others)
    return Group(phrase, named, members, found, before, float(covered), is_part)


def _separation(scores: Array, members: Bools, others: Bools) -> float:
    """BSI of members above others; 0 when they lie below."""
    a, b = scores[members], scores[others]
    spread = float(np.hypot(a.std(), b.std()))
    return max(0.0, float(a.mean() - b.mean()) / spread) if spread > 0 else 0.0


def _by_chance(
    space: Space,
    base: Space | None,
    free: Bools,
    kind: NDArray[np.int64],
    order: NDArray[np.int64],
    seed: int,
    group: Group,
) -> float:
    """The most that random groups gain that are as large as the phrase of `group`."""
    gained = 0.0
    for drawn in random_groups(group.named, free, kind, order, seed):
        members = _far_out(space, drawn) if group.is_part else drawn
        if members.sum() >= FEWEST:
            # Coverage, the kinds' only use there, is not asked of a random group.
            found = _look(space, base, "", drawn, members, free, kind, group.is_part)
            gained = max(gained, found.gained)
    return gained


def _best(
    groups: list[Group],
    separation: float,
    room: float,
    anchored: bool,
    chance: Callable[[Group], float],
) -> Group | None:
    """The group that stands out most, if any passes."""
    passing = []
    for group in groups:
        if not FEWEST <= group.members.sum() <= room:
            continue
        if group.at_least < group.asked(separation):
            continue
        if not anchored:
            peers = [
                g.separation
                for g in groups
                if g.coverage >= 0.5 and _overlap(g.members, group.members) < 0.5
            ]
            if group.coverage < 0.5 or group.separation < STANDS_OUT * max(peers, default=0.0):
                continue
        if group.members.sum() <= SMALL:
            group.chance = chance(group)
            if group.at_least - (group.before or 0.0) < group.chance:
                continue
        passing.append(group)
    best = max(passing, key=lambda g: g.gained, default=None)
    if best is None:
        return None
    # Parts of one phrase pick the same rows: name the whole of it.
    same = [g for g in passing if _overlap(g.members, best.members) >= 0.9]
    return max(same, key=lambda g: (len(g.phrase), g.gained))


def _overlap(a: Bools, b: Bools) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def _mixture(scores: Array) -> tuple[float, float, float]:
    """Share, mean and std of a shifted component beside the others' standard Gaussian (EM)."""
    share, mean, std = 0.5, max(1.0, float(np.quantile(scores, 0.9))), 1.0
    for _ in range(100):
        weight = _weight(scores, share, mean, std)
        total = weight.sum() + 1e-9
        before, mean = mean, float((weight * scores).sum() / total)
        share = float(np.clip(total / len(scores), 1e-3, 1 - 1e-3))
        std = float(np.clip(np.sqrt((weight * (scores - mean) ** 2).sum() / total), 0.3, 5.0))
        if abs(mean - before) < 1e-6:
            break
    return share, mean, std


def _weight(scores: Array, share: float, mean: float, std: float) -> Array:
    """Posterior of the shifted component."""
    odds = np.log(share / (1 - share) / std) + (scores**2 - ((scores - mean) / std) ** 2) / 2
    found: Array = expit(odds)
    return found


def _posterior(scores: Array, share: float, mean: float, std: float) -> Array:
    """`_weight` made monotone: 1 beyond the component's mean, 0 below zero."""
    found = _weight(scores, share, mean, std)
    return np.where(scores <= 0, 0.0, np.where(scores >= mean, 1.0, found))


def _holding(phrases: list[str], held: Any, phrase: str) -> Bools:
    column = phrases.index(phrase)
    return np.asarray(held[:, [column]].todense()).ravel().astype(bool)


def _layer_stats(profile: Profile, groups: list[Group], seed: int) -> tuple[LayerStat, ...]:
    """Per layer, BSI of flagged against other rows' entropy; of a free split when none is."""
    if not groups:
        return tuple(
            LayerStat(layer, float(split_in_two(column, seed=seed).bsi), selected=True)
            for layer, column in zip(profile.layers, profile.entropy.T, strict=True)
        )
    members = np.logical_or.reduce([g.members for g in groups])
    stats = []
    for layer, column in zip(profile.layers, profile.entropy.T, strict=True):
        a, b = column[members], column[~members]
        gap = abs(float(a.mean()) - float(b.mean())) / (float(np.hypot(a.std(), b.std())) + 1e-9)
        stats.append(LayerStat(layer, gap, selected=True))
    return tuple(stats)


def _figures(group: Group) -> str:
    words = f"separation {group.separation:.2f}"
    if group.before is not None:
        words += f", {group.before:.2f} before the fine-tune"
    if group.chance is not None:
        words += f", gained at most {group.chance:.2f} by chance"
    return words


def _why(groups: list[Group], shown: list[Group], separation: float, anchored: bool) -> str:
    if groups:
        said = "; ".join(f"“{g.phrase}” ({_figures(g)})" for g in groups)
        return f"they teach the same words and the model looks at them in a new way: {said}"
    if not shown:
        return "no words are shared by enough answers"
    return (
        "no group of rows with shared words is looked at in a new way "
        f"(closest: “{shown[0].phrase}”, {_figures(shown[0])}; {_needed(separation, anchored)})"
    )


def _needed(separation: float, anchored: bool) -> str:
    if anchored:
        return (
            f"{GAINED * separation:g} more than before and {GROWTH:g} times that before are needed,"
            " after two standard errors"
        )
    return (
        f"{separation:g} plus two standard errors is needed, over half of the kinds of prompt,"
        f" and {STANDS_OUT:g} times the next phrase"
    )


def _as_json(group: Group, separation: float) -> dict[str, Any]:
    return {
        "phrase": group.phrase,
        "rows": int(group.members.sum()),
        "separation": round(group.separation, 3),
        "at_least": round(group.at_least, 3),
        "asked": round(group.asked(separation), 3),
        "separation_before": None if group.before is None else round(group.before, 3),
        "coverage": round(group.coverage, 3),
        "gained_by_chance": None if group.chance is None else round(group.chance, 3),
    }
