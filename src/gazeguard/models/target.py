"""`Target`: a loaded model and what the rest of gazeguard must know about it, no more."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gazeguard.errors import ModelError, RowError
from gazeguard.models.family import Family
from gazeguard.models.files import first_line
from gazeguard.models.offload import compute_device, one_thread_each
from gazeguard.models.registry import family_of
from gazeguard.models.spans import (
    Prompt,
    answer_tokens,
    placeholder_tokens,
    user_tokens,
    write_answers,
    write_apart,
    write_prompt,
)
from gazeguard.types import KeyKind, Sample

Grid = tuple[int, int]

# Made by some processors, not for the forward pass.
_NOT_FOR_FORWARD = ("labels", "offset_mapping", "text_replacement_offsets", "special_tokens_mask")
# Layer types without an attention row.
WITHOUT_ROWS = frozenset({"linear_attention", "conv", "moe", "mlp", "mamba"})


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The tokens of one image of a prompt.

    Attributes:
        count: how many there are, at least one.
        grid: their rows and columns; None when they are not one plain grid (tiles, row
            separators), or when they are those of several images that cannot be told apart.
    """

    count: int
    grid: Grid | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(rows, columns)` where the grid is known, else `(count,)`."""
        return self.grid or (self.count,)


Images = tuple[ImageTokens, ...]
"""The images of one prompt in prompt order; their counts sum to its image positions."""


def by_image(values: Tensor, images: Images) -> list[Tensor]:
    """Values of a prompt's image tokens, `(..., token)`, as `(..., *shape)` for each image."""
    parts = zip(values.split_with_sizes([image.count for image in images], -1), images, strict=True)
    return [part.reshape(*part.shape[:-1], *image.shape) for part, image in parts]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch of prompts, ready for the model.

    Where every answer was asked for, "sample" is an answer below, with the prompt before it.

    Attributes:
        inputs: keyword arguments of the model's forward pass, on the CPU.
        key_kind: int8 `(sample, key)` of `KeyKind`, one per input position; what comes after a
            prompt is `PAD`.
        sample_id: one id per sample.
        images: per sample, what is known of each image's tokens.
        source: per sample, the place of its inputs in the batch; empty where each has its own.
        stretched: per line of `inputs`, what stands in its prompt for an image and what the
            processor wrote instead, in prompt order.
    """

    inputs: dict[str, Tensor]
    key_kind: Tensor
    sample_id: tuple[str, ...]
    images: tuple[Images, ...]
    source: tuple[int, ...] = ()
    stretched: tuple[tuple[tuple[str, str], ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Target:
    """A vision-language model in eval mode with its processor.

    Attributes:
        model: the model; a `peft.PeftModel` when an adapter was given.
        processor: turns prompts and images into inputs.
        family: what is particular to its kind.
        name: the id or folder the user gave.
        decoder: the language model whose attention is watched.
        layers: decoder layers that yield attention rows.
        image_token_id: input id of image positions.
        folder: where the weights were read, or None for a model made in memory.
        revision: commit or tag of a hub model.
        adapter: folder of the LoRA adapter, or None.
    """

    model: nn.Module
    processor: Any
    family: Family
    name: str
    decoder: nn.Module
    layers: tuple[int, ...]
    image_token_id: int
    folder: Path | None = None
    revision: str | None = None
    adapter: Path | None = None

    @property
    def base(self) -> Any:
        """The transformers model, without a PEFT wrapper."""
        return _unwrapped(self.model)

    @property
    def device(self) -> torch.device:
        """Where inputs go: where the token embeddings compute."""
        return compute_device(self.base.get_input_embeddings())

    @property
    def is_half(self) -> bool:
        """Whether its numbers have 16 bits."""
        return self.base.dtype in (torch.float16, torch.bfloat16)

    @property
    def trims_logits(self) -> bool:
        """Whether its forward pass can leave out logits (`logits_to_keep`)."""
        return "logits_to_keep" in inspect.signature(self.base.forward).parameters

    @property
    def attention_modules(self) -> dict[nn.Module, int]:
        """Modules of the decoder that belong to a numbered layer, and that number."""
        return _numbered(self.decoder)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The model as it was before its LoRA fine-tune; only for a target with an adapter."""
        # Not `disable_adapter()`: it surveys every parameter first, which takes longer than a
        # small model's forward pass. The adapter was attached here, so its state is known.
        tuner: Any = self.model.base_model
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()

    def prompt(self, sample: Sample) -> Prompt:
        """Write one sample's prompt; raises `RowError` for a sample that has none."""
        return write_prompt(self.family, self.processor, sample, self.reserved)

    def encode(
        self,
        samples: Sequence[Sample],
        padding_side: Literal["left", "right"] = "left",
        *,
        every_answer: bool = False,
    ) -> Encoded:
        """Turn samples into one padded batch, with the kind of every position.

        Args:
            samples: at least one; each prompt needs an image.
            padding_side: where shorter prompts are padded.
            every_answer: instead of `prompt_turns`, all of `Sample.asked`: a conversation is one
                line of the batch up to its last answer where the model allows that.

        Raises:
            RowError: a sample that this model cannot take; the message names its row.
            ModelError: a processor that does not say where tokens come from.
        """
        prompts = [self._named(sample, every_answer) for sample in samples]
        return self._encoded(samples, prompts, padding_side)

    def _encoded(
        self,
        samples: Sequence[Sample],
        written: Sequence[Sequence[Prompt]],
        padding_side: Literal["left", "right"],
    ) -> Encoded:
        """A batch of prompts, one or several for each sample."""
        lines = [(s, p) for s, prompts in zip(samples, written, strict=True) for p in prompts]
        texts = [prompt.text for _, prompt in lines]
        images = [[sample.images[i] for i in prompt.images] for sample, prompt in lines]
        try:
            batch = self.processor(
                text=texts,
                images=images,
                padding=True,
                padding_side=padding_side,
                add_special_tokens=self._lacks_bos(texts[0]),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
        except ValueError as error:
            rows = ", ".join(str(sample.row) for sample in samples)
            raise RowError(
                f"the model's processor refuses row {rows} ({first_line(error)}): check its image"
                " and text."
            ) from error
        replaced, offsets = batch.get("text_replacement_offsets"), batch.get("offset_mapping")
        if replaced is None or offsets is None or len(replaced) != len(lines):
            raise ModelError(
                f"the processor of {self.name} does not tell where its image tokens go: use a model"
                " of a family listed in the documentation."
            )
        starts = [
            answer_tokens(prompt, replaced[i], offsets[i].tolist()) if prompt.earlier else []
            for i, (_, prompt) in enumerate(lines)
        ]
        if None in starts:
            inside = {id(s) for (s, _), first in zip(lines, starts, strict=True) if first is None}
            again = [
                self._apart(sample) if id(sample) in inside else prompts
                for sample, prompts in zip(samples, written, strict=True)
            ]
            return self._encoded(samples, again, padding_side)
        return self._measured(lines, [first or [] for first in starts], batch)

    def _named(self, sample: Sample, every_answer: bool) -> tuple[Prompt, ...]:
        try:
            if not every_answer:
                return (self.prompt(sample),)
            whole = write_answers(self.family, self.processor, sample, self.reserved)
            return self._apart(sample) if whole is None else (whole,)
        except RowError as error:
            raise RowError(f"row {sample.row}: {error}") from error

    def _apart(self, sample: Sample) -> tuple[Prompt, ...]:
        return write_apart(self.family, self.processor, sample, self.reserved)

    def tokens(self, prompt: Prompt, stretched: Sequence[tuple[str, str]]) -> list[int]:
        """Input ids of a prompt about images that are encoded already, without reading them again.

        Args:
            prompt: with the same images in the same order.
            stretched: their line of `Encoded.stretched`.
        """
        text, at = prompt.laid_out, 0
        for placeholder, written in stretched:
            start = text.index(placeholder, at)
            text = text[:start] + written + text[start + len(placeholder) :]
            at = start + len(written)
        ids = self.processor.tokenizer(text, add_special_tokens=self._lacks_bos(prompt.text))
        return list(ids["input_ids"])

    def _lacks_bos(self, text: str) -> bool:
        """A template that writes BOS itself must not get a second one."""
        bos = self.processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    @property
    def reserved(self) -> tuple[str, ...]:
        """Strings in a prompt that would be taken for an image or a video."""
        own = self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
        found = (getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video"))
        return tuple(dict.fromkeys(str(word) for word in (own, *found) if word))

    def _measured(
        self,
        lines: Sequence[tuple[Sample, Prompt]],
        starts: Sequence[Sequence[int]],
        batch: Mapping[str, Any],
    ) -> Encoded:
        """Kinds of all positions; `starts` are the first tokens of earlier answers, by line."""
        inputs = {
            name: value
            for name, value in batch.items()
            if name not in _NOT_FOR_FORWARD and torch.is_tensor(value)
        }
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        kind = torch.full_like(ids, KeyKind.TEMPLATE, dtype=torch.int8)
        replaced, offsets = batch["text_replacement_offsets"], batch["offset_mapping"]
        for i, (_, prompt) in enumerate(lines):
            words = user_tokens(prompt, replaced[i], offsets[i].tolist())
            kind[i, torch.tensor(words)] = KeyKind.PROMPT
        kind[ids == self.image_token_id] = KeyKind.IMAGE
        kind[~real] = KeyKind.PAD
        kinds, source, images = [], [], []
        first = 0
        for i, (sample, prompt) in enumerate(lines):
            slots = (kind[i] == KeyKind.IMAGE).nonzero().flatten()
            if not len(slots):
                raise RowError(
                    f"row {sample.row}: no image token reached the model: check its text."
                )
            counts = [len(slots)]
            if len(prompt.images) > 1:
                counts = placeholder_tokens(replaced[i], offsets[i][slots].tolist())
                if len(counts) != len(prompt.images) or sum(counts) != len(slots):
                    counts = []  # a processor with placeholders of its own
            for mine, looked_at in _by_answer(kind[i], prompt, starts[i]):
                if looked_at:
                    seen = slots[mine[slots] == KeyKind.IMAGE]
                    whole = [n for n, so_far in _summed(counts) if so_far <= len(seen)]
                    images.append(self.image_tokens(seen, whole, inputs, first))
                    kinds.append(mine)
                    source.append(i)
            first += len(prompt.images)
        named = tuple(lines[i][0].sample_id for i in source)
        own = source == list(range(len(lines)))
        stretched = tuple(tuple((i["text"], i["replacement"]) for i in line) for line in replaced)
        return Encoded(
            inputs,
            torch.stack(kinds),
            named,
            tuple(images),
            () if own else tuple(source),
            stretched,
        )

    def image_tokens(
        self, slots: Tensor, counts: Sequence[int], inputs: Mapping[str, Tensor], first: int
    ) -> Images:
        """What is known of the images of one prompt of a batch.

        Args:
            slots: int64 `(token,)`, the prompt's image positions, ascending.
            counts: how many of them each image has; empty when that cannot be told, which gives
                all tokens as one, without a grid.
            inputs: the processor's output for the batch.
            first: place of the prompt's first image among those of the batch.
        """
        if not all(counts) or not counts:
            return (ImageTokens(len(slots)),) if len(slots) else ()
        found = []
        for i, mine in enumerate(slots.split_with_sizes(list(counts))):
            together = int(mine[-1] - mine[0]) + 1 == len(mine)
            config = self.base.config
            grid = None
            if together:
                grid = self.family.grid(self.processor, config, inputs, first + i, len(mine))
            found.append(ImageTokens(len(mine), grid))
        return tuple(found)


def as_target(
    model: nn.Module,
    processor: Any,
    *,
    name: str = "model in memory",
    folder: Path | None = None,
    revision: str | None = None,
    adapter: Path | None = None,
) -> Target:
    """Make a `Target` of a model that is already loaded; puts it in eval mode.

    Raises:
        ModelError: the model has no decoder with attention over image tokens.
    """
    base = _unwrapped(model)
    config = base.config
    kind = config.model_type
    image_token_id = getattr(config, "image_token_id", None)
    if image_token_id is None or getattr(config, "is_encoder_decoder", False) or _crosses(base):
        raise ModelError(
            f"{name} is a '{kind}' model, whose decoder does not attend to image tokens among its"
            " inputs: use a model that does, such as LLaVA, Qwen2.5-VL, InternVL or Gemma 3."
        )
    decoder = base.get_decoder()
    while hasattr(decoder, "get_decoder") and decoder.get_decoder() is not decoder:
        decoder = decoder.get_decoder()
    types = getattr(decoder.config, "layer_types", None) or ()
    layers = tuple(
        layer
        for layer in sorted(set(_numbered(decoder).values()))
        if layer >= len(types) or types[layer] not in WITHOUT_ROWS
    )
    if not layers:
        raise ModelError(
            f"{name} is a '{kind}' model whose attention layers cannot be told apart: use a model"
            " implemented in transformers 5, such as LLaVA or Qwen2.5-VL."
        )
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{name} has no fast tokenizer, so its prompt tokens cannot be told apart: add the"
            " tokenizer.json of the model it was made from."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # never attended: the mask hides it
    one_thread_each(model)
    return Target(
        model.eval(),
        processor,
        family_of(kind),
        name,
        decoder,
        layers,
        int(image_token_id),
        folder,
        revision,
        adapter,
    )


def _by_answer(
    kind: Tensor, prompt: Prompt, starts: Sequence[int]
) -> Iterator[tuple[Tensor, bool]]:
    """The kinds of a prompt's positions as each of its answers has them, and if it is looked at."""
    slots, before = torch.arange(len(kind)), 0
    ends = [
        (first, looked_at) for first, (_, looked_at) in zip(starts, prompt.earlier, strict=True)
    ]
    for end, looked_at in (*ends, (len(kind), True)):
        mine = kind.clone()
        mine[(slots < before) & (kind == KeyKind.PROMPT)] = KeyKind.TEMPLATE
        mine[end:] = KeyKind.PAD
        before = end
        yield mine, looked_at


def _summed(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each count with the sum up to it."""
    return zip(counts, accumulate(counts), strict=True)


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _crosses(base: nn.Module) -> bool:
    """Whether images are read through cross-attention, apart from the input ids (mllama)."""
    return any(name.endswith(("cross_attn", "crossattention")) for name, _ in base.named_modules())


def _numbered(decoder: nn.Module) -> dict[nn.Module, int]:
    found = {}
    for module in decoder.modules():
        layer = vars(module).get("layer_idx")  # a miss through `getattr` costs 20 times as much
        if isinstance(layer, int):
            found[module] = layer
    return found
