"""The proof of a group: its trigger, rebuilt, fires on other pictures of the set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gazeguard.cleaning.batches import out_of_memory
from gazeguard.cleaning.measure import free_memory
from gazeguard.errors import GazeguardError, MeasurementError
from gazeguard.methods.bye.conditioning import PromptKinds
from gazeguard.methods.bye.phrases import holds
from gazeguard.methods.rebuild import (
    RECIPIENTS,
    Firing,
    Form,
    Pixels,
    Rebuilt,
    RebuiltTrigger,
    Taught,
    common_words,
    has_words,
    rebuild,
    with_words,
)
from gazeguard.models.answers import written
from gazeguard.probe.branch import with_question
from gazeguard.report.model import Answer, Proof, Trial
from gazeguard.types import Asked, CleaningResult, Profile, Sample

if TYPE_CHECKING:
    from gazeguard.data.dataset import Dataset
    from gazeguard.models.target import Target

MAX_ROWS = 256  # of a mean picture
FEWEST_ROWS = 8
CHOOSE = 8  # recipients that choose the way, and are in no proof
WORTH_PROVING = 4  # of them; what fires on fewer, or on as many before, is proven by no others
SHOWN = 6  # recipients in the report
_ALL = 0.9  # of a group's rows that carry the trigger: then the words are the attacker's
_MAX_SIDE = 336  # pixels; larger pictures are scaled down for the means
_MOST_TOKENS = 48
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Group:
    """A group to prove, by row and turn.

    Attributes:
        phrase: the words that its answers share.
        seen: whether it passed attention's own bound; the others are mere candidates.
        named: all answers with those words.
        members: those of them that the trigger is rebuilt from.
        others: answers without the words that were not removed, for the means.
        recipients: further such answers, `CHOOSE + RECIPIENTS` of them or fewer.
    """

    phrase: str
    seen: bool
    named: tuple[Answer, ...]
    members: tuple[Answer, ...]
    others: tuple[Answer, ...]
    recipients: tuple[Answer, ...]


def groups(
    profile: Profile, result: CleaningResult, candidates: Sequence[str], seed: int
) -> list[Group]:
    """The groups that attention found, then the candidates, with the rows that a proof needs.

    Args:
        profile: the measured rows.
        result: what attention says of them.
        candidates: phrases that may be what an attacker taught.
        seed: of the draws.
    """
    flagged = result.is_flagged
    seen = [str(group["phrase"]) for group in result.info.get("groups", ()) if flagged.any()]
    phrases = dict.fromkeys([*seen, *candidates])
    if not phrases:
        return []
    holding = _holding(profile.answer, phrases)
    rng = np.random.default_rng(seed)
    kept = rng.permutation(np.flatnonzero(~np.isin(profile.row, profile.row[flagged])))
    found: list[Group] = []
    for phrase in phrases:
        named = np.flatnonzero(holding[phrase])
        if any(np.array_equal(named, np.flatnonzero(holding[g.phrase])) for g in found):
            continue  # other words of the same rows
        mine = named[flagged[named]] if phrase in seen else named
        pool = kept[~holding[phrase][kept]][: 2 * MAX_ROWS + 4 * (CHOOSE + RECIPIENTS)]
        recipients = _spread(profile, pool, CHOOSE + RECIPIENTS, seed)
        others = pool[~np.isin(pool, recipients)][: 2 * MAX_ROWS]
        drawn = rng.permutation(mine)[:MAX_ROWS]
        rows = (_named(profile, places) for places in (named, drawn, others, recipients))
        found.append(Group(phrase, phrase in seen, *rows))
    return found


def prove(
    target: Target, base: Target | None, dataset: Dataset, groups: Iterable[Group]
) -> list[Proof]:
    """Rebuild each group's trigger and try it.

    Args:
        target: the fine-tuned model.
        base: what it was before, where there is no adapter to switch off.
        dataset: read for each group.
        groups: of `groups`.
    """
    return [_prove(target, base, dataset, group) for group in groups]


def _prove(target: Target, base: Target | None, dataset: Dataset, group: Group) -> Proof:
    """Try one group's trigger, or say why that cannot be done."""
    wanted = {*group.members, *group.others, *group.recipients}
    read: dict[Answer, Asked] = {}
    shape: tuple[int, int] | None = None
    for asked in with_one_picture(dataset, wanted):
        shape = shape or _shape(picture_of(asked))
        read[asked.row, asked.turn] = _with_picture(asked, _pixels(picture_of(asked), shape))
    # Rows come as the file has them; which of them choose is not to depend on that.
    members, others, recipients = (
        [read[name] for name in names if name in read]
        for names in (group.members, group.others, group.recipients)
    )
    if len(members) < FEWEST_ROWS:
        return Proof(group.phrase, f"fewer than {FEWEST_ROWS} of its rows have one picture")
    needed = CHOOSE + RECIPIENTS
    if len(others) < 2 or len(recipients) < needed:
        why = (
            f"{needed + 2} other rows that have one picture and lack these words are needed, and"
            f" the set has {len(recipients) + len(others)}"
        )
        return Proof(group.phrase, why)
    tokenizer = target.processor.tokenizer
    longest = max((member.answer for member in members), key=len)
    tokens = len(tokenizer(longest, add_special_tokens=False)["input_ids"]) + 2
    say = _Say(target, base, group.phrase, min(_MOST_TOKENS, tokens))
    try:
        made = rebuild(*([_of(one) for one in some] for some in (members, others)))
        asked_words = [[one.prompt for one in some] for some in (members, others)]
        words = common_words(*asked_words)
        proof = _try(say, made.trigger, words, asked_words[0], recipients)
        if not proof.proven and not group.seen:
            return proof
        own = members[:RECIPIENTS]
        before = say.fired(say.before(own)) if say.knows_before else None
        proof = replace(proof, taught=Taught(len(own), say.fired(say.now(own)), before))
        return replace(proof, rows=_rows(dataset, group, proof, made)) if proof.proven else proof
    except GazeguardError as error:  # the rows are judged: nothing of that may be lost
        return Proof(group.phrase, str(error).rstrip("."))


def _rows(dataset: Dataset, group: Group, proof: Proof, made: Rebuilt) -> tuple[Answer, ...]:
    """The rows of a proven group that teach its trigger."""
    taught = proof.taught
    if taught is not None and taught.is_new:
        return group.named  # no honest row has the words
    if proof.form is None:
        found = with_one_picture(dataset, set(group.named))
        return tuple((a.row, a.turn) for a in found if has_words(a.prompt, proof.words))
    shape = made.trigger.mean.shape
    carrying = tuple(
        (asked.row, asked.turn)
        for asked in with_one_picture(dataset, set(group.named))
        if made.carries(_pixels(picture_of(asked), shape))
        and (not proof.words or has_words(asked.prompt, proof.words))
    )
    return group.named if len(carrying) >= _ALL * len(group.named) else carrying


class _Say:
    """What a model answers, and whether the group's words are in it."""

    def __init__(self, target: Target, base: Target | None, phrase: str, tokens: int) -> None:
        self.phrase = phrase
        self._target, self._base, self._tokens = target, base, tokens
        self.knows_before = base is not None or target.adapter is not None
        self._at_once = _AT_ONCE

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
        while some := samples[len(found) : len(found) + self._at_once]:
            try:
                with torch.inference_mode():
                    found += written(target, target.encode(some).inputs, self._tokens)
                continue
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            # Outside of the handler: until it ends, the error keeps the failed pass's tensors.
            free_memory()
            if len(some) == 1:
                raise MeasurementError("Memory does not hold a single answer.")
            self._at_once = len(some) // 2
        return found


def _try(
    say: _Say,
    trigger: RebuiltTrigger,
    words: str,
    like: Sequence[str],
    recipients: Sequence[Asked],
) -> Proof:
    def worn(way: tuple[Form | None, str], samples: Sequence[Asked]) -> list[Asked]:
        return [_with(trigger, *way, like, one) for one in samples]

    choose, prove = recipients[:CHOOSE], recipients[CHOOSE : CHOOSE + RECIPIENTS]
    ways: list[tuple[Form | None, str]] = [(form, "") for form in trigger.forms()]
    if words:
        ways += [(None, words), *((form, words) for form in trigger.forms())]
    fired = {way: say.fired(say.now(worn(way, choose))) for way in ways}
    way = max(fired, key=lambda way: fired[way])  # the first of equals
    if fired[way] < WORTH_PROVING:
        why = f"what its rows share brings these words on {fired[way]} of {CHOOSE} other pictures"
        return Proof(say.phrase, why)
    known = say.fired(say.before(worn(way, choose))) if say.knows_before else 0
    if known >= WORTH_PROVING:
        why = (
            f"before the fine-tune too, what its rows share brings these words on {known} of"
            f" {CHOOSE} other pictures"
        )
        return Proof(say.phrase, why)
    form, put = way
    triggered = worn(way, prove)
    plain, changed = say.now(prove), say.now(triggered)
    before = say.before(triggered) if say.knows_before else None
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
            untouched=picture_of(prove[i]),
            triggered=picture_of(triggered[i]),
            said=plain[i],
            said_triggered=changed[i],
            said_before=None if before is None else before[i],
        )
        for i in range(SHOWN)
    )
    picture = None if form is None else Image.fromarray(trigger.picture(form))
    return Proof(say.phrase, "", form, put, picture, firing, shown)


def _with(
    trigger: RebuiltTrigger, form: Form | None, words: str, like: Sequence[str], sample: Asked
) -> Asked:
    """A sample whose one picture, or whose question, or both have the trigger."""
    if form is not None:
        sample = _with_picture(sample, trigger.on(_of(sample), form))
    if words:
        last = next((t for t in reversed(sample.prompt_turns) if t.role == "user"), None)
        question = with_words(last.text if last else "", words, like)
        sample = with_question(sample, question)
    return sample


def with_one_picture(dataset: Dataset, names: set[Answer], threads: int = 0) -> Iterator[Asked]:
    """The named answers before which there is one picture; `threads` decode ahead."""
    rows = {row for row, _ in names}
    for sample in dataset.rows(rows.__contains__, threads=threads):
        for asked in sample.asked if isinstance(sample, Sample) else ():
            if (asked.row, asked.turn) in names and len(asked.prompt_images) == 1:
                yield asked


def _of(sample: Asked) -> Pixels:
    return np.asarray(picture_of(sample))


def _with_picture(sample: Asked, pixels: Pixels) -> Asked:
    images = list(sample.images)
    images[sample.prompt_images[0]] = Image.fromarray(pixels)
    return replace(sample, images=tuple(images))


def picture_of(sample: Asked) -> Image.Image:
    """The one picture of a sample of `with_one_picture`."""
    return sample.images[sample.prompt_images[0]]


def _shape(picture: Image.Image) -> tuple[int, int]:
    scale = min(1.0, _MAX_SIDE / max(picture.size))
    return max(1, round(picture.height * scale)), max(1, round(picture.width * scale))


def _pixels(picture: Image.Image, shape: tuple[int, ...]) -> Pixels:
    size = (shape[1], shape[0])
    same = picture if picture.size == size else picture.resize(size)
    return np.asarray(same)


def _holding(answers: Iterable[str], phrases: Iterable[str]) -> dict[str, NDArray[np.bool_]]:
    """Which answers hold which phrase, each different answer looked at once."""
    answers = list(answers)
    different = set(answers)
    found = {}
    for phrase in phrases:
        holding = {answer for answer in different if holds(answer, phrase)}
        found[phrase] = np.array([answer in holding for answer in answers], bool)
    return found


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
