"""Which tokens of a batch that somebody else encoded are image, user's words, template.

`Target.encode` knows this because it writes the prompt. A batch that a user made with their own
processor is only ids. Here the template's tokens are learnt once, from prompts that `encode` wrote,
and then taken off the ends of every stretch of text. For a conversation of one user turn this
gives what `encode` gives; in longer ones the template's words between turns count as the user's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from PIL import Image
from torch import Tensor

from gazeguard.models.target import Images, Target
from gazeguard.types import ImagePart, KeyKind, Sample, TextPart, Turn

# Two texts without a common letter: what their prompts share is the template's.
_FILLERS = ("a", "7")
_SIDE = 56  # pixels of the blank picture; a multiple of the usual patch sizes


@dataclass(frozen=True, slots=True)
class Frame:
    """A template's plain (not special) tokens around images and the user's words.

    Attributes:
        head: before the first word.
        head_before_image: before an image that comes first; a tokenizer may join the template's
            last space with a word that follows it.
        tail: after the last word.
        before_image: between words and an image that follows.
        after_image: between an image and words that follow.
        after_last_image: between an image and the end, when no words follow.
        special: ids of special tokens, which are never a user's words.
    """

    head: tuple[int, ...]
    head_before_image: tuple[int, ...]
    tail: tuple[int, ...]
    before_image: tuple[int, ...]
    after_image: tuple[int, ...]
    after_last_image: tuple[int, ...]
    special: frozenset[int]


def frame_of(target: Target) -> Frame:
    """Learn a target's template from both orders of one image and one short text."""
    tokenizer = target.processor.tokenizer
    added = tokenizer.added_tokens_decoder
    special = frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
    image_first, words_first = (
        [_pieces(target, text, image_first, special) for text in _FILLERS]
        for image_first in (True, False)
    )
    return Frame(
        head=_shared([pieces[0] for pieces in words_first]),
        head_before_image=_shared([pieces[0] for pieces in image_first]),
        tail=_shared([pieces[-1] for pieces in image_first], at_end=True),
        # A family that puts images first whatever the order has no piece between words and image.
        before_image=_shared([pieces[_WORDS_IMAGE] for pieces in words_first], at_end=True),
        after_image=_shared([pieces[_IMAGE_WORDS] for pieces in image_first]),
        after_last_image=_shared([pieces[_IMAGE_END] for pieces in words_first]),
        special=special,
    )


def recognise(
    target: Target, frame: Frame, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """The kind of every position of a padded batch.

    Args:
        target: the model the batch is for.
        frame: from `frame_of`.
        input_ids: int64 `(sample, position)`, image placeholders stretched.
        attention_mask: `(sample, position)`, 0 on padding; None for no padding.

    Returns:
        int8 `(sample, position)` of `KeyKind`, on the CPU.
    """
    ids = input_ids.cpu()
    real = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
    kind = torch.full_like(ids, KeyKind.TEMPLATE, dtype=torch.int8)
    kind[ids == target.image_token_id] = KeyKind.IMAGE
    kind[real == 0] = KeyKind.PAD
    for i, row in enumerate(ids.tolist()):
        for slots in _words(target, frame, row, kind[i]):
            kind[i, slots] = KeyKind.PROMPT
    return kind


def images(target: Target, kind: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Images, ...]:
    """What is known of each sample's images, as in `Encoded.images`.

    Images that cannot be told apart count as one without a grid: some of them are cut into tiles,
    or stand next to each other with no token in between.

    Args:
        target: the model the batch is for.
        kind: from `recognise`.
        inputs: what the processor made: pixels, image sizes.
    """
    slots = [(row == KeyKind.IMAGE).nonzero().flatten() for row in kind]
    found: list[Images] = []
    first = 0  # place of the sample's first image among those of the batch
    for mine, counts in zip(slots, _counts(target, slots, inputs), strict=True):
        found.append(target.image_tokens(mine, counts, inputs, first))
        first += len(counts)
    return tuple(found)


def _counts(
    target: Target, slots: Sequence[Tensor], inputs: Mapping[str, Tensor]
) -> list[list[int]]:
    """Tokens of each image, per sample; empty where its images cannot be told apart."""
    sizes = _image_tokens(target, inputs)
    if sizes is not None:
        left = iter(sizes)
        return [_filling(left, len(mine)) for mine in slots]
    runs = [_runs(mine) for mine in slots]
    each = sum(len(mine) for mine in runs) == _pictures(inputs)
    return [mine if each or len(mine) == 1 else [] for mine in runs]


def _filling(sizes: Iterator[int], tokens: int) -> list[int]:
    """The next sizes that make up so many tokens; empty when they do not."""
    counts: list[int] = []
    while sum(counts) < tokens and (size := next(sizes, None)) is not None:
        counts.append(size)
    return counts if sum(counts) == tokens else []


def _runs(slots: Tensor) -> list[int]:
    """Lengths of the stretches of neighbouring positions."""
    if not len(slots):
        return []
    breaks = (slots.diff() > 1).nonzero().flatten() + 1
    return [len(run) for run in slots.tensor_split(breaks)]


def _pictures(inputs: Mapping[str, Tensor]) -> int | None:
    """How many pictures the batch has, or None.

    Where pixels come as tiles it is the number of tiles. Such a picture's tokens are one run, so
    there are as many runs as tiles only if nothing was cut.
    """
    if "image_sizes" in inputs:
        return len(inputs["image_sizes"])
    pixels = inputs.get("pixel_values")
    return len(pixels) if pixels is not None and pixels.ndim == 4 else None


def _image_tokens(target: Target, inputs: Mapping[str, Tensor]) -> list[int] | None:
    """Tokens of each image of the batch, where the processor tells; else None."""
    shape = inputs.get("image_grid_thw")
    if shape is None:
        return None
    merge = int(target.processor.image_processor.merge_size)
    return [int(size) // merge**2 for size in shape.prod(-1)]


def _words(target: Target, frame: Frame, ids: list[int], kind: Tensor) -> list[list[int]]:
    """Positions of the user's words, one list per stretch of text."""
    stretches: list[list[int]] = [[]]
    kinds = kind.tolist()
    for slot, (token, its_kind) in enumerate(zip(ids, kinds, strict=True)):
        if its_kind == KeyKind.IMAGE:
            if slot == 0 or kinds[slot - 1] != KeyKind.IMAGE:
                stretches.append([])
        elif its_kind != KeyKind.PAD and token not in frame.special:
            stretches[-1].append(slot)
    final = len(stretches) - 1
    words = []
    for i, slots in enumerate(stretches):
        tokens = tuple(ids[slot] for slot in slots)
        if 0 < i < final and not target.processor.tokenizer.decode(tokens).strip():
            continue  # line ends between the tiles of an image
        if i == final > 0 and tokens == frame.after_last_image:
            continue
        if i == 0 < final and tokens == frame.head_before_image:
            continue
        if i == 0:
            start = _common(tokens, frame.head)
        else:
            start = _whole(tokens, frame.after_image)
        rest = tokens[start:]
        if i == final:
            stop = _common(rest[::-1], frame.tail[::-1])
        else:
            stop = _whole(rest[::-1], frame.before_image[::-1])
        words.append(slots[start : len(slots) - stop])
    return words


def _common(tokens: tuple[int, ...], part: tuple[int, ...]) -> int:
    """How many first tokens the two have in common."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, part, strict=False))
    return len(list(same))


def _whole(tokens: tuple[int, ...], part: tuple[int, ...]) -> int:
    """The length of `part` when `tokens` begin with all of it, else 0."""
    return len(part) if tokens[: len(part)] == part else 0


_IMAGE_WORDS, _WORDS_IMAGE, _IMAGE_END = "image-words", "words-image", "image-end"


def _pieces(
    target: Target, text: str, image_first: bool, special: frozenset[int]
) -> dict[object, tuple[int, ...]]:
    """The plain template tokens of a prompt, by what stands around them.

    Keys: 0 for the piece before everything, -1 for the one after the last word, and the names
    above.
    """
    parts = (ImagePart(0), TextPart(text)) if image_first else (TextPart(text), ImagePart(0))
    blank = Image.new("RGB", (_SIDE, _SIDE), "gray")
    encoded = target.encode([Sample(0, "", (blank,), (Turn("user", parts),))])
    kinds = encoded.key_kind[0].tolist()
    ids = encoded.inputs["input_ids"][0].tolist()
    image = [i for i, kind in enumerate(kinds) if kind == KeyKind.IMAGE]
    words = [i for i, kind in enumerate(kinds) if kind == KeyKind.PROMPT]

    def plain(start: int, stop: int) -> tuple[int, ...]:
        return tuple(ids[i] for i in range(start, stop) if ids[i] not in special)

    after_words = max(words) > max(image)
    return {
        0: plain(0, min(*image, *words)),
        -1: plain(max(words) + 1, len(ids)) if after_words else (),
        _IMAGE_WORDS: plain(max(image) + 1, min(words)) if after_words else (),
        _WORDS_IMAGE: () if after_words else plain(max(words) + 1, min(image)),
        _IMAGE_END: () if after_words else plain(max(image) + 1, len(ids)),
    }


def _shared(runs: Sequence[tuple[int, ...]], at_end: bool = False) -> tuple[int, ...]:
    """What all runs have in common at their start, or their end."""
    if at_end:
        return _shared([run[::-1] for run in runs])[::-1]
    return runs[0][: min(_common(runs[0], run) for run in runs)]
