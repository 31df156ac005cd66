"""The proof of a removed group: its trigger, rebuilt, fires on other pictures of the set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gazeguard.errors import GazeguardError
from gazeguard.methods.bye.conditioning import PromptKinds
from gazeguard.methods.bye.phrases import holds
from gazeguard.methods.rebuild import RECIPIENTS, Firing, Form, Moments, Pixels, RebuiltTrigger
from gazeguard.models.answers import written
from gazeguard.report.model import Answer, Proof, Trial
from gazeguard.types import Asked, CleaningResult, Profile, Sample

if TYPE_CHECKING:
    from gazeguard.data.dataset import Dataset
    from gazeguard.models.target import Target

MAX_GROUPS = 5
MAX_ROWS = 256  # of a mean picture
FEWEST_ROWS = 8
CHOOSE = 8  # recipients that choose the form, and are in no proof
SHOWN = 6  # recipients in the report
_MAX_SIDE = 448  # pixels; larger pictures are scaled down for the means
_MOST_TOKENS = 48
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Group:
    """A group to prove, by row and turn.

    Attributes:
        phrase: the words that its answers share.
        members: removed answers with those words.
        others: kept answers without them, for the means.
        recipients: further kept answers without them, `CHOOSE + RECIPIENTS` of them or fewer.
    """

    phrase: str
    members: tuple[Answer, ...]
    others: tuple[Answer, ...]
    recipients: tuple[Answer, ...]


def groups(profile: Profile, result: CleaningResult, seed: int) -> list[Group]:
    """The largest removed groups of a judged set, with the rows that their proof needs."""
    phrases = [str(group["phrase"]) for group in result.info.get("groups", ())][:MAX_GROUPS]
    if not phrases:
        return []
    rng = np.random.default_rng(seed)
    flagged = result.is_flagged
    kept = rng.permutation(np.flatnonzero(~np.isin(profile.row, profile.row[flagged])))
    kind = PromptKinds(profile.prompt, profile.turn, seed=seed)(profile.prompt, profile.turn)[1]
    found = []
    for phrase in phrases:
        members = [i for i in np.flatnonzero(flagged).tolist() if holds(profile.answer[i], phrase)]
        free = (i for i in kept.tolist() if not holds(profile.answer[i], phrase))
        pool = np.array(list(islice(free, MAX_ROWS + 4 * (CHOOSE + RECIPIENTS))), np.int64)
        recipients = _spread(pool, kind[pool], CHOOSE + RECIPIENTS)
        others = pool[~np.isin(pool, recipients)][:MAX_ROWS]
        chosen = rng.permutation(members)[:MAX_ROWS]
        named = (_named(profile, places) for places in (chosen, others, recipients))
        found.append(Group(phrase, *named))
    return found


def prove(
    target: Target, base: Target | None, dataset: Dataset, groups: Sequence[Group]
) -> list[Proof]:
    """Rebuild each group's trigger and try it.

    Args:
        target: the fine-tuned model.
        base: what it was before, where there is no adapter to switch off.
        dataset: read once for all groups.
        groups: of `groups`.
    """
    wanted = {one for g in groups for one in (*g.members, *g.others, *g.recipients)}
    rows = {row for row, _ in wanted}
    moments: dict[tuple[str, bool], Moments] = {}
    recipients: dict[Answer, Asked] = {}
    shape: tuple[int, int] | None = None
    tokens = 1
    role = {one: (g.phrase, True) for g in groups for one in g.members}
    pools = [(g.phrase, set(g.others)) for g in groups]
    takers = {one for g in groups for one in g.recipients}
    for sample in dataset.rows(rows.__contains__):
        for asked in sample.asked if isinstance(sample, Sample) else ():
            name = (asked.row, asked.turn)
            if name not in wanted or len(asked.prompt_images) != 1:
                continue
            picture = asked.images[asked.prompt_images[0]]
            shape = shape or _shape(picture)
            if name in takers:
                recipients[name] = asked
            keys = [role[name]] if name in role else []
            keys += [(phrase, False) for phrase, pool in pools if name in pool]
            if name in role:
                tokens = max(tokens, _length(target, asked.answer))
            for key in keys:
                moments.setdefault(key, Moments(shape)).add(_pixels(picture, shape))
    proofs = []
    for group in groups:
        inside, outside = (moments.get((group.phrase, which)) for which in (True, False))
        given = [recipients[one] for one in group.recipients if one in recipients]
        if inside is None or outside is None or inside.count < FEWEST_ROWS:
            why = f"fewer than {FEWEST_ROWS} of its rows, or none of the others, have one picture"
            proofs.append(Proof(group.phrase, why))
        elif len(given) < CHOOSE + RECIPIENTS:
            why = (
                f"only {len(given)} other rows with one picture lack these words, and"
                f" {CHOOSE + RECIPIENTS} are needed"
            )
            proofs.append(Proof(group.phrase, why))
        else:
            trigger = RebuiltTrigger.of(inside, outside)
            say = _Say(target, base, group.phrase, min(_MOST_TOKENS, tokens + 2))
            try:
                proofs.append(_try(say, trigger, given))
            except GazeguardError as error:  # the rows are judged: nothing of that may be lost
                proofs.append(Proof(group.phrase, str(error).rstrip(".")))
    return proofs


class _Say:
    """What a model answers, and whether the group's words are in it."""

    def __init__(self, target: Target, base: Target | None, phrase: str, tokens: int) -> None:
        self.phrase = phrase
        self._target, self._base, self._tokens = target, base, tokens
        self.knows_before = base is not None or target.adapter is not None

    def now(self, samples: Sequence[Sample]) -> list[str]:
        return self._answers(self._target, samples)

    def before(self, samples: Sequence[Sample]) -> list[str]:
        """Before the fine-tune."""
        if self._base is not None:
            return self._answers(self._base, samples)
        with self._target.without_adapter():
            return self._answers(self._target, samples)

    def fired(self, answers: Iterable[str]) -> int:
        return sum(holds(answer, self.phrase) for answer in answers)

    def _answers(self, target: Target, samples: Sequence[Sample]) -> list[str]:
        found: list[str] = []
        with torch.inference_mode():
            for start in range(0, len(samples), _AT_ONCE):
                inputs = target.encode(samples[start : start + _AT_ONCE]).inputs
                found += written(target, inputs, self._tokens)
        return found


def _try(say: _Say, trigger: RebuiltTrigger, recipients: Sequence[Asked]) -> Proof:
    choose, prove = recipients[:CHOOSE], recipients[CHOOSE : CHOOSE + RECIPIENTS]
    fired = {
        form: say.fired(say.now([_with(trigger, form, one) for one in choose]))
        for form in trigger.forms()
    }
    form = max(fired, key=lambda form: fired[form])  # the first of equals
    worn = [_with(trigger, form, one) for one in prove]
    plain, changed = say.now(prove), say.now(worn)
    before = say.before(worn) if say.knows_before else None
    firing = Firing(
        len(prove),
        say.fired(changed),
        say.fired(plain),
        None if before is None else say.fired(before),
    )
    shown = tuple(
        Trial(
            row=prove[i].row,
            prompt=prove[i].prompt,
            untouched=_picture(prove[i]),
            triggered=_picture(worn[i]),
            said=plain[i],
            said_triggered=changed[i],
            said_before=None if before is None else before[i],
        )
        for i in range(SHOWN)
    )
    return Proof(say.phrase, "", form, Image.fromarray(trigger.picture(form)), firing, shown)


def _with(trigger: RebuiltTrigger, form: Form, sample: Asked) -> Asked:
    """A sample whose one picture wears the trigger."""
    place = sample.prompt_images[0]
    changed = trigger.on(_pixels(sample.images[place], trigger.constant.shape), form)
    images = list(sample.images)
    images[place] = Image.fromarray(changed)
    return replace(sample, images=tuple(images))


def _picture(sample: Asked) -> Image.Image:
    return sample.images[sample.prompt_images[0]]


def _shape(picture: Image.Image) -> tuple[int, int]:
    scale = min(1.0, _MAX_SIDE / max(picture.size))
    return max(1, round(picture.height * scale)), max(1, round(picture.width * scale))


def _pixels(picture: Image.Image, shape: tuple[int, ...]) -> Pixels:
    size = (shape[1], shape[0])
    same = picture if picture.size == size else picture.resize(size)
    return np.asarray(same.convert("RGB"))


def _length(target: Target, answer: str) -> int:
    return len(target.processor.tokenizer(answer, add_special_tokens=False)["input_ids"])


def _named(profile: Profile, places: Iterable[int]) -> tuple[Answer, ...]:
    return tuple((int(profile.row[i]), int(profile.turn[i])) for i in places)


def _spread(pool: NDArray[np.int64], kind: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Up to `most` of the pool, of every kind in turn."""
    rank = np.zeros(len(pool), np.int64)
    for each in np.unique(kind):
        rank[kind == each] = np.arange(int((kind == each).sum()))
    return pool[np.argsort(rank, kind="stable")[:most]]
