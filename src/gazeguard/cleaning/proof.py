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
    found = []
    for phrase in phrases:
        members = [i for i in np.flatnonzero(flagged).tolist() if holds(profile.answer[i], phrase)]
        free = (i for i in kept.tolist() if not holds(profile.answer[i], phrase))
        pool = np.array(list(islice(free, MAX_ROWS + 4 * (CHOOSE + RECIPIENTS))), np.int64)
        recipients = _spread(profile, pool, CHOOSE + RECIPIENTS, seed)
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
    read = [_Read() for _ in groups]
    roles: dict[Answer, list[tuple[_Read, str]]] = {}
    for group, mine in zip(groups, read, strict=True):
        for role in ("members", "others", "recipients"):
            for name in getattr(group, role):
                roles.setdefault(name, []).append((mine, role))
    rows = {row for row, _ in roles}
    shape: tuple[int, int] | None = None
    for sample in dataset.rows(rows.__contains__):
        for asked in sample.asked if isinstance(sample, Sample) else ():
            wanted = roles.get((asked.row, asked.turn), [])
            if wanted and len(asked.prompt_images) == 1:
                shape = shape or _shape(_picture(asked))
                sized = _with_picture(asked, _pixels(_picture(asked), shape))
                for mine, role in wanted:
                    mine.take(role, sized)
    return [_proof(target, base, g, mine) for g, mine in zip(groups, read, strict=True)]


class _Read:
    """What a group's proof needs of its rows; all pictures have one size."""

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}
        self.recipients: list[Asked] = []
        self.longest = ""

    def take(self, role: str, sample: Asked) -> None:
        """Take in one row."""
        if role == "recipients":
            self.recipients.append(sample)
            return
        if role == "members":
            self.longest = max(self.longest, sample.answer, key=len)
        pixels = np.asarray(_picture(sample))
        self.moments.setdefault(role, Moments(pixels.shape[:2])).add(pixels)


def _proof(target: Target, base: Target | None, group: Group, read: _Read) -> Proof:
    """Try one group's trigger, or say why that cannot be done."""
    members, others = read.moments.get("members"), read.moments.get("others")
    needed = CHOOSE + RECIPIENTS
    if members is None or members.count < FEWEST_ROWS:
        return Proof(group.phrase, f"fewer than {FEWEST_ROWS} of its rows have one picture")
    if others is None or len(read.recipients) < needed:
        why = (
            f"{needed + 1} other rows that have one picture and lack these words are needed, and"
            f" the set has {len(read.recipients) + (others.count if others else 0)}"
        )
        return Proof(group.phrase, why)
    tokenizer = target.processor.tokenizer
    tokens = len(tokenizer(read.longest, add_special_tokens=False)["input_ids"]) + 2
    say = _Say(target, base, group.phrase, min(_MOST_TOKENS, tokens))
    # Rows come as the file has them; which of them choose is not to depend on that.
    places = {name: place for place, name in enumerate(group.recipients)}
    recipients = sorted(read.recipients, key=lambda one: places[one.row, one.turn])
    try:
        return _try(say, RebuiltTrigger.of(members, others), recipients)
    except GazeguardError as error:  # the rows are judged: nothing of that may be lost
        return Proof(group.phrase, str(error).rstrip("."))


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
    return _with_picture(sample, trigger.on(np.asarray(_picture(sample)), form))


def _with_picture(sample: Asked, pixels: Pixels) -> Asked:
    images = list(sample.images)
    images[sample.prompt_images[0]] = Image.fromarray(pixels)
    return replace(sample, images=tuple(images))


def _picture(sample: Asked) -> Image.Image:
    return sample.images[sample.prompt_images[0]]


def _shape(picture: Image.Image) -> tuple[int, int]:
    scale = min(1.0, _MAX_SIDE / max(picture.size))
    return max(1, round(picture.height * scale)), max(1, round(picture.width * scale))


def _pixels(picture: Image.Image, shape: tuple[int, ...]) -> Pixels:
    size = (shape[1], shape[0])
    same = picture if picture.size == size else picture.resize(size)
    return np.asarray(same)


def _named(profile: Profile, places: Iterable[int]) -> tuple[Answer, ...]:
    return tuple((int(profile.row[i]), int(profile.turn[i])) for i in places)


def _spread(profile: Profile, pool: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """Up to `most` of the pool, of every kind of prompt in turn."""
    if not len(pool):
        return pool
    prompts, turn = [profile.prompt[i] for i in pool.tolist()], profile.turn[pool]
    kind = PromptKinds(prompts, turn, seed=seed)(prompts, turn)[1]
    rank = np.zeros(len(pool), np.int64)
    for each in np.unique(kind):
        rank[kind == each] = np.arange(int((kind == each).sum()))
    return pool[np.argsort(rank, kind="stable")[:most]]
