"""Other questions about the same pictures, behind one reading of each picture.

What a trigger makes a model say, it says whatever is asked. So the same pictures are asked several
questions, and an answer is scored under each. The pictures' keys and values are computed once: the
prompts are read up to where their questions part, and each question goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gazeguard.errors import RowError, UsageError
from gazeguard.models.answers import answer_ids, answered, end_tokens, padded, written
from gazeguard.models.target import WITHOUT_ROWS, Encoded, Target
from gazeguard.probe.cache import cache_in, cache_name, divides, for_lines
from gazeguard.probe.check import needs_check
from gazeguard.types import ImagePart, Sample, TextPart, Turn

Tokens = list[int]
S = TypeVar("S", bound=Sample)

# Largest difference, in nats per token, between a model read once and read apart.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2
_divides: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # which models agree


@dataclass(frozen=True, slots=True)
class Branch:
    """One sample under its questions.

    Attributes:
        log_probability: float32 `(question,)`, nats per token of the answer's first tokens.
        agrees: bool `(question,)`, whether the model itself would write those tokens, greedily.
        texts: what it writes, one per question; empty where that was not asked for.
        shared: whether its pictures were read once for all questions.
    """

    log_probability: Tensor
    agrees: Tensor
    texts: tuple[str, ...]
    shared: bool


def with_question(sample: S, question: str) -> S:
    """The sample with other words in the last user turn of its prompt; pictures stay in place.

    Raises:
        RowError: the prompt has no user turn.
    """
    turns = list(sample.turns)
    asked = [i for i, turn in enumerate(sample.prompt_turns) if turn.role == "user"]
    if not asked:
        raise RowError(f"row {sample.row} asks nothing: put a question into a user turn.")
    before = turns[asked[-1]].parts
    pictures: list[TextPart | ImagePart] = [p for p in before if isinstance(p, ImagePart)]
    last = max((i for i, part in enumerate(before) if isinstance(part, TextPart)), default=None)
    at = sum(isinstance(part, ImagePart) for part in before[:last])
    turns[asked[-1]] = Turn("user", (*pictures[:at], TextPart(question), *pictures[at:]))
    return replace(sample, turns=tuple(turns))


def branch(
    target: Target,
    samples: Sequence[Sample],
    questions: Sequence[Sequence[str]],
    answers: Sequence[str],
    *,
    tokens: int = 8,
    write: bool = False,
    batch_size: int = 32,
) -> list[Branch]:
    """Score each sample's answer under each of its questions.

    Args:
        target: the model.
        samples: one batch; all their pictures are encoded together.
        questions: per sample, one or more; each stands where `with_question` puts it.
        answers: one per sample.
        tokens: how many tokens of an answer count, its end token among them.
        write: let the model answer as well, greedily, in as many tokens.
        batch_size: questions per forward pass.

    Returns:
        One per sample. The figures are those of a prompt of its own for each question, whatever
        else is in the batch, up to the rounding of the model's kernels. A model that is not of a
        tested family or version is compared with such a prompt once, and if they differ all its
        questions get one.

    Raises:
        RowError: a sample that the model cannot take, with its own words or another question.
        UsageError: a number below 1, or lists of unlike lengths.
    """
    if min(tokens, batch_size) < 1:
        raise UsageError("tokens and batch_size are 1 or more.")
    if not len(samples) == len(questions) == len(answers) or not all(questions):
        raise UsageError("give every sample one answer and one or more questions.")
    told = [ids[:tokens] for ids in answer_ids(target, answers)]
    lines = [
        _Line(i, with_question(sample, text), told[i])
        for i, (sample, asked) in enumerate(zip(samples, questions, strict=True))
        for text in asked
    ]
    with torch.inference_mode():
        shared = _read_once(target, lines) if _divides.get(target.base, True) else None
        if shared is not None:
            for chunk in _chunks(target, shared, lines, batch_size):
                _go_on(target, shared, chunk, tokens if write else 0)
            if not _as_apart(target, lines):
                for line in lines:
                    line.tail = None
        rest = [line for line in lines if line.tail is None]
        for start in range(0, len(rest), batch_size):
            _whole(target, rest[start : start + batch_size], tokens if write else 0)
    found = []
    for _, group in groupby(lines, lambda line: line.sample):
        mine = list(group)
        found.append(
            Branch(
                torch.tensor([line.log_probability for line in mine]),
                torch.tensor([line.agrees for line in mine]),
                tuple(line.text for line in mine) if write else (),
                mine[0].tail is not None,
            )
        )
    return found


@dataclass(slots=True)
class _Line:
    """One question about one sample, and what came of it.

    Attributes:
        sample: its place in the batch.
        asked: the sample with that question.
        told: tokens of the answer.
        tail: tokens of the prompt behind what all of the sample's questions share; None when the
            prompt is read for itself.
        slot: the sample's place among those that are read once.
    """

    sample: int
    asked: Sample
    told: Tokens
    tail: Tokens | None = None
    slot: int = 0
    log_probability: float = 0.0
    agrees: bool = False
    text: str = ""


@dataclass(frozen=True, slots=True)
class _Shared:
    """What was read once: a line per sample, padded on the left.

    Attributes:
        cache: keys and values.
        real: bool `(sample, slot)`, which slots are no padding.
        position: int64 `(sample,)`, the position id of the token to come.
    """

    cache: Any
    real: Tensor
    position: Tensor


def _read_once(target: Target, lines: Sequence[_Line]) -> _Shared | None:
    """Read what each sample's prompts share, and give its lines their tails and slots.

    Lines whose pictures are no prefix get none: words that see those behind them, layers that keep
    a state, a cache that cannot be divided, questions in front of a picture.
    """
    types = set(getattr(target.decoder.config, "layer_types", None) or ())
    if not lines or target.family.sees_ahead or types & WITHOUT_ROWS:
        return None
    groups = [list(group) for _, group in groupby(lines, lambda line: line.sample)]
    encoded = target.encode([group[0].asked for group in groups])
    ids, real = encoded.inputs["input_ids"], encoded.inputs["attention_mask"].bool()
    ends, prompts, unfit = [], [], set()
    for i, group in enumerate(groups):
        asked = [target.tokens(target.prompt(x.asked), encoded.stretched[i]) for x in group]
        end = _common([prompt[:-1] for prompt in asked])
        tails = (token for prompt in asked for token in prompt[end:])
        if asked[0] != ids[i][real[i]].tolist() or target.image_token_id in tails:
            unfit.add(i)
        ends.append(end)
        prompts.append(asked)
    if unfit:
        return _read_once(
            target, [x for i, group in enumerate(groups) if i not in unfit for x in group]
        )
    inputs = {k: v.to(target.device) for k, v in _cut(encoded, ends).items()}
    model: Any = target.model
    cache = cache_in(model(**inputs, use_cache=True, **_keep(target, 1)))
    if cache is None or not divides(cache):
        return None
    for slot, group in enumerate(groups):
        for line, prompt in zip(group, prompts[slot], strict=True):
            line.slot, line.tail = slot, prompt[ends[slot] :]
    read = inputs["attention_mask"].bool()
    return _Shared(cache, read, _next_position(target, read))


def _as_apart(target: Target, lines: Sequence[_Line]) -> bool:
    """Whether a model may be read in this way: of an untested one a sample is read apart, once."""
    if target.base not in _divides:
        _divides[target.base] = True
        if needs_check(target):
            first = next(line.sample for line in lines if line.tail is not None)
            mine = [line for line in lines if line.sample == first]
            apart = [replace(line, tail=None) for line in mine]
            _whole(target, apart, 0)
            most = _HALF_TOLERANCE if target.is_half else _TOLERANCE
            _divides[target.base] = all(
                abs(a.log_probability - b.log_probability) <= most
                for a, b in zip(mine, apart, strict=True)
            )
    return _divides[target.base]


def _go_on(target: Target, shared: _Shared, lines: Sequence[_Line], write: int) -> None:
    """Answer lines from where their samples' prompts part."""
    at = torch.tensor([line.slot for line in lines], device=target.device)
    pad = target.processor.tokenizer.pad_token_id

    def forward(tokens: Sequence[Tokens], keep: int) -> tuple[Tensor, Any, Tensor, Tensor]:
        ids, real = padded(tokens, pad, target.device, left=True)
        cache = for_lines(shared.cache, at)
        position = shared.position[at, None] + (real.cumsum(1) - 1).clamp(min=0)
        seen = torch.cat([shared.real[at], real], 1)
        return _step(target, ids, cache, seen, position, keep), cache, seen, position[:, -1]

    longest = max(len(line.told) for line in lines)
    logits, *_ = forward([[*(x.tail or ()), *x.told] for x in lines], longest + 1)
    for line, mine in zip(lines, logits, strict=True):
        _score(line, mine[-len(line.told) - 1 : -1])
    if not write:
        return
    logits, cache, seen, position = forward([x.tail or [] for x in lines], 1)
    told: list[Tensor] = []
    ends = torch.tensor(end_tokens(target), device=target.device)
    done = torch.zeros(len(lines), dtype=torch.bool, device=target.device)
    while True:
        new = logits[:, -1].argmax(-1).masked_fill(done, pad)
        told.append(new)
        done |= torch.isin(new, ends)
        if len(told) == write or bool(done.all()):
            break
        position = position + 1
        seen = torch.cat([seen, ~done[:, None]], 1)
        logits = _step(target, new[:, None], cache, seen, position[:, None], 1)
    texts = target.processor.tokenizer.batch_decode(torch.stack(told, 1), skip_special_tokens=True)
    for line, text in zip(lines, texts, strict=True):
        line.text = text.strip()


def _whole(target: Target, lines: Sequence[_Line], write: int) -> None:
    """Answer lines from prompts of their own."""
    encoded = target.encode([line.asked for line in lines])
    inputs = {k: v.to(target.device) for k, v in encoded.inputs.items()}
    longest = max(len(line.told) for line in lines)
    model: Any = target.model
    longer = answered(target, inputs, [line.told for line in lines])
    logits = model(**longer, use_cache=False, **_keep(target, longest + 1)).logits
    for line, mine in zip(lines, logits[:, -longest - 1 :], strict=True):
        _score(line, mine[: len(line.told)])
    if write:
        for line, text in zip(lines, written(target, inputs, write), strict=True):
            line.text = text


def _step(
    target: Target, ids: Tensor, cache: Any, seen: Tensor, position: Tensor, keep: int
) -> Tensor:
    """Logits `(line, keep, vocabulary)` of the last tokens; the cache grows."""
    model: Any = target.model
    out = model(
        input_ids=ids,
        attention_mask=seen.long(),
        position_ids=position,
        use_cache=True,
        **{cache_name(target.base): cache},
        **_keep(target, keep),
    )
    logits: Tensor = out.logits[:, -keep:]
    return logits


def _score(line: _Line, logits: Tensor) -> None:
    """Of logits `(token, vocabulary)`, each those before the answer's token."""
    wanted = torch.tensor(line.told, device=logits.device)
    all_of_them = logits.float().log_softmax(-1)
    line.log_probability = float(all_of_them.gather(1, wanted[:, None]).mean())
    line.agrees = bool((all_of_them.argmax(-1) == wanted).all())


def _cut(encoded: Encoded, ends: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of every prompt's first tokens alone, padded on the left; pictures as they are."""
    ids, real = encoded.inputs["input_ids"], encoded.inputs["attention_mask"].bool()
    width = max(ends)
    cut = dict(encoded.inputs)
    for name, value in encoded.inputs.items():
        if value.shape[:2] != ids.shape:
            continue
        fill = int(ids[~real][0]) if name == "input_ids" and not bool(real.all()) else 0
        shorter = value.new_full((len(ids), width, *value.shape[2:]), fill)
        for i, end in enumerate(ends):
            shorter[i, width - end :] = value[i][real[i]][:end]
        cut[name] = shorter
    return cut


def _next_position(target: Target, real: Tensor) -> Tensor:
    """The position id of the token behind prompts that were just read, int64 `(sample,)`.

    Positions are slots, padding included. Of M-RoPE they are those of the tokens, less what an
    image's tokens share, which the model keeps for its own decoding.
    """
    for module in target.base.modules():
        shift = vars(module).get("rope_deltas")
        if torch.is_tensor(shift) and len(shift) == len(real):
            return real.sum(1) + shift.flatten().to(real.device)
    return torch.full_like(real[:, 0], real.shape[1], dtype=torch.long)


def _common(prompts: Sequence[Tokens]) -> int:
    """Length of the longest common prefix."""
    shared = zip(*prompts, strict=False)
    return next(
        (i for i, tokens in enumerate(shared) if len(set(tokens)) > 1), min(map(len, prompts))
    )


def _keep(target: Target, last: int) -> dict[str, int]:
    """The language head over a whole prompt would cost more than the rest."""
    return {"logits_to_keep": last} if target.trims_logits else {}


def _chunks(
    target: Target, shared: _Shared, lines: Sequence[_Line], size: int
) -> Iterator[list[_Line]]:
    """Lines for one pass each.

    They are padded between what was read once and their own words. A sliding window counts padding
    as well, so where one may reach over it lines of unlike lengths are kept apart.
    """
    groups: dict[tuple[int, int], list[_Line]] = {}
    window = getattr(target.decoder.config, "sliding_window", None)
    for line in lines:
        if line.tail is not None:
            length = (len(line.tail), len(line.told))
            apart = window and shared.real.shape[1] + sum(length) > window
            groups.setdefault(length if apart else (0, 0), []).append(line)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
