"""A text encoder that can be run with one free embedding among its tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gazeguard.errors import MeasurementError, ModelError
from gazeguard.models.encoders.kinds import Kind


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokenised prompts, padded on the right to one length.

    Attributes:
        ids: int64 `(prompt, position)`.
        real: bool `(prompt, position)`, False on padding.
    """

    ids: Tensor
    real: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> Tokens:
        """Some prompts, at the same length."""
        return Tokens(self.ids[rows], self.real[rows])

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt without padding, `(prompt,)`."""
        return self.real.sum(1)

    def cut(self) -> Tokens:
        """Without the padding that all prompts share."""
        longest = int(self.lengths.max())
        return Tokens(self.ids[:, :longest], self.real[:, :longest])

    def repeated(self, times: int) -> Tokens:
        """The prompts `times` times over: `(times * prompt, position)`."""
        return Tokens(self.ids.repeat(times, 1), self.real.repeat(times, 1))


@dataclass(frozen=True, slots=True)
class States:
    """What an encoder gives back.

    Attributes:
        tokens: `(prompt, position, width)`, output states of all positions.
        pooled: `(prompt, features)`, the one vector that stands for the prompt.
        real: bool `(prompt, position)`, False on padding.
    """

    tokens: Tensor
    pooled: Tensor
    real: Tensor


class TextEncoder:
    """A text encoder and its tokenizer, whatever the family.

    The free embedding is put in by a hook on the token embedding: masks, positions and pooling
    stay the model's own, so the result equals that of a token with this embedding. (The public
    AMDET code inserts it after positions were added, so the words behind it keep the positions of
    a prompt without a trigger; a real trigger shifts them, as here.)

    Attributes:
        name: as the user gave it.
        folder: where the weights were read.
        kind: its family.
        model: the text module; frozen.
        projection: applied to the pooled output, or None.
        tokenizer: of transformers.
        width: of a token embedding.
        depth: number of layers.
        length: positions, BOS and EOS included.
        slot: position of the free embedding: behind BOS, or first where there is no BOS.
        causal: whether a token sees only those before it.
    """

    def __init__(
        self,
        model: Any,
        projection: Any,
        tokenizer: Any,
        kind: Kind,
        *,
        name: str,
        folder: Path | None,
    ) -> None:
        self.model, self.projection, self.tokenizer = model, projection, tokenizer
        self.kind, self.name, self.folder = kind, name, folder
        config = model.config
        self.width: int = self.embeddings.shape[1]
        self.depth = int(config.num_hidden_layers)
        self.length = _length(tokenizer, config)
        self._pad = _pad(tokenizer)
        self.slot = self._find_slot()
        self.placeholder = self._find_placeholder()
        self.causal = self._is_causal()

    @property
    def embeddings(self) -> Tensor:
        """The token embedding table `(vocabulary, width)`."""
        table: Tensor = self.model.get_input_embeddings().weight
        return table

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.embeddings.dtype

    def tokenise(self, prompts: Sequence[str], *, slot: bool = False) -> Tokens:
        """Prompts as ids, each at most `length` tokens, padded to `length`.

        Args:
            prompts: one or more.
            slot: leave a place for the free embedding; other tokens are cut by one if need be.
                Without it they are cut to the same words, so that both can be compared.

        Raises:
            ModelError: the tokenizer knows tokens that the model does not.
        """
        encoded = self.tokenizer(
            list(prompts), truncation=True, max_length=self.length - 1, padding=False
        )["input_ids"]
        rows = [list(map(int, row)) for row in encoded]
        if slot:
            rows = [[*row[: self.slot], self.placeholder, *row[self.slot :]] for row in rows]
        highest = max((max(row) for row in rows if row), default=0)
        if max(highest, self._pad) >= len(self.embeddings):
            raise ModelError(
                f"the tokenizer of {self.name} has a token {highest} but the model only"
                f" {len(self.embeddings)} of them: copy both from the same model."
            )
        ids = torch.full((len(rows), self.length), self._pad, dtype=torch.long)
        real = torch.zeros(len(rows), self.length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            real[i, : len(row)] = True
        return Tokens(ids.to(self.device), real.to(self.device))

    def too_long(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than fit beside the free embedding."""
        if not prompts:
            return 0
        encoded = self.tokenizer(list(prompts), padding=False, verbose=False)["input_ids"]
        return sum(len(row) > self.length - 1 for row in encoded)

    def run(
        self, tokens: Tokens, vectors: Tensor | None = None, *, padding: bool = False
    ) -> States:
        """Run prompts through the encoder.

        Args:
            tokens: from `tokenise`; with `slot=True` when `vectors` are given.
            vectors: `(prompt, width)`, the free embedding of each prompt; gradients flow to it.
            padding: keep shared padding although the output does not depend on it, for its states.
        """
        if not padding and not self.kind.full_length:
            tokens = tokens.cut()
        splice = nullcontext() if vectors is None else self._spliced(vectors)
        mask = {"attention_mask": tokens.real.long()} if self.kind.masked else {}
        with splice:
            out = self.model(input_ids=tokens.ids, **mask)
        pooled = getattr(out, "pooler_output", None)
        if pooled is None or self.kind.masked:
            pooled = out.last_hidden_state[:, 0]  # BERT types: the state of the first token
        if self.projection is not None:
            pooled = self.projection(pooled)
        return States(out.last_hidden_state, pooled, tokens.real)

    def unprojected(self) -> TextEncoder:
        """The same encoder without its projection, to compare with a text model alone."""
        twin = copy.copy(self)
        twin.projection = None
        return twin

    def check_finite(self) -> None:
        """Look at every weight.

        Raises:
            MeasurementError: some weight is NaN or infinite.
        """
        parts = (self.model, self.projection)
        weights = [w for part in parts if part is not None for w in part.parameters()]
        if broken := sum(not torch.isfinite(weight).all() for weight in weights):
            raise MeasurementError(
                f"the weights of {self.name} are not finite in {broken} of {len(weights)} tensors:"
                " copy or download the model again."
            )

    @contextmanager
    def _spliced(self, vectors: Tensor) -> Iterator[None]:
        slot = self.slot

        def replace_slot(_module: Any, _args: Any, out: Tensor) -> Tensor:
            free = vectors.to(out.dtype)[:, None]
            return torch.cat([out[:, :slot], free, out[:, slot + 1 :]], 1)

        hook = self.model.get_input_embeddings().register_forward_hook(replace_slot)
        try:
            yield
        finally:
            hook.remove()

    def _find_slot(self) -> int:
        """1 behind a token that begins every prompt, else 0 (SigLIP has no BOS)."""
        first = {self.tokenizer(text)["input_ids"][0] for text in ("a cat", "two dogs", "snow")}
        return 1 if len(first) == 1 else 0

    def _find_placeholder(self) -> int:
        """An ordinary token: never pooled at, as EOS would be."""
        special = set(self.tokenizer.all_special_ids)
        ordinary = [i for i in self.tokenizer("a cat")["input_ids"] if i not in special]
        if not ordinary:
            raise ModelError(
                f"the tokenizer of {self.name} has no token for 'a cat': copy the tokenizer files"
                " again."
            )
        return int(ordinary[0])

    def _is_causal(self) -> bool:
        """Whether another last word leaves the states before it as they were."""
        tokens = self.tokenise(["a cat"]).cut()
        if not self.kind.masked:
            tokens = replace(tokens, real=torch.ones_like(tokens.real))
        ids = tokens.ids.clone()
        end = ids.shape[1] - 1
        ids[:, end] = self.placeholder
        with torch.no_grad():
            one, other = (
                self.model(
                    input_ids=rows,
                    **({"attention_mask": tokens.real.long()} if self.kind.masked else {}),
                ).last_hidden_state[:, :end]
                for rows in (tokens.ids, ids)
            )
        return bool(torch.equal(one, other))


def _pad(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _length(tokenizer: Any, config: Any) -> int:
    """Tokens of the longest prompt: what both the model and its tokenizer allow."""
    positions = int(config.max_position_embeddings)
    if config.model_type.startswith("altclip"):  # as in RoBERTa, positions start behind padding's
        positions -= int(config.pad_token_id) + 1
    return min(positions, int(tokenizer.model_max_length))
