"""The probe: where does the model look at the moment before it answers?

One forward pass with the model's own attention kernel; beside it, one softmax row per sample and
layer from the last prompt position. Extra memory is O(prompt length), never a whole map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from gazeguard.errors import ModelError, RowError, UsageError
from gazeguard.models.target import Encoded, Target
from gazeguard.probe.check import compare, needs_check, picture_and_question
from gazeguard.probe.intercept import AttentionCall, intercept
from gazeguard.probe.rows import last_real, row
from gazeguard.types import AttentionRows, KeyKind, Sample

Layers = Literal["all"] | Sequence[int]


def probe(
    target: Target,
    samples: Iterable[Sample],
    *,
    layers: Layers = "all",
    reduce_heads: bool = True,
    batch_size: int = 8,
    on_skip: Callable[[Sample, RowError], None] | None = None,
) -> Iterator[AttentionRows]:
    """Measure samples in batches, in their order.

    Args:
        target: the model.
        samples: read lazily, one batch at a time.
        layers: decoder layers to keep, or `all`.
        reduce_heads: average over heads right away (head axis of length 1).
        batch_size: samples per forward pass.
        on_skip: called for a sample that this model cannot take, which is then left out. Without
            it such a sample raises.

    Yields:
        One `AttentionRows` per batch that has a usable sample.

    Raises:
        RowError: an unusable sample and no `on_skip`.
        ModelError: the model's attention cannot be read.
        UsageError: a layer that the model does not have, or a batch size below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} is too small: use 1 or more.")
    remaining = iter(samples)
    while batch := tuple(islice(remaining, batch_size)):
        encoded = target.encode(batch) if on_skip is None else _usable(target, batch, on_skip)
        if encoded is not None:
            yield attend(target, encoded, layers=layers, reduce_heads=reduce_heads)


def attend(
    target: Target, encoded: Encoded, *, layers: Layers = "all", reduce_heads: bool = True
) -> AttentionRows:
    """Measure one encoded batch.

    Returns:
        Rows of the last real position of every prompt, on the device of the model's inputs.
        `finite` is False for a sample whose weights hold NaN or infinity, or the next-token logits
        at the end of its inputs.

    Raises:
        ModelError: an expected layer was not seen, or its attention cannot be read; or the model's
            family or transformers is not a tested one and its rows differ from eager attention.
        UsageError: a layer that the model does not have.
    """
    wanted = _chosen(target, layers)
    check_rows(target)
    return _attend(target, encoded, wanted, reduce_heads)


def check_rows(target: Target) -> None:
    """Compare a model that is not of a tested family, or version, with its own eager attention.

    One short prompt, once; `attend` does it first.

    Raises:
        ModelError: the rows differ, or cannot be compared.
    """
    if needs_check(target):
        encoded = picture_and_question(target)
        compare(target, encoded, _attend(target, encoded, target.layers, False).weights)


def _attend(
    target: Target, encoded: Encoded, wanted: tuple[int, ...], reduce_heads: bool
) -> AttentionRows:
    device = target.device
    inputs = {name: value.to(device) for name, value in encoded.inputs.items()}
    last = last_real(encoded.key_kind).to(device)
    source, query = _queries(encoded.source or range(len(last)))
    at = torch.zeros(int(source[-1]) + 1, int(query.max()) + 1, dtype=last.dtype, device=device)
    at[source, query] = last
    rows: dict[int, Tensor] = {}

    def watch(call: AttentionCall) -> Any:
        if call.layer not in rows:
            weights = row(call, at)[source, query]
            rows[call.layer] = weights.mean(1, keepdim=True) if reduce_heads else weights
        return call.run()

    watched = {m: layer for m, layer in target.attention_modules.items() if layer in wanted}
    with torch.inference_mode(), intercept(watched, watch):
        logits = _last_logits(target, inputs, at.amax(1))[source]
    unseen = [layer for layer in wanted if layer not in rows]
    if unseen:
        raise ModelError(
            f"{target.name} computes layer {unseen[0]} without transformers' attention interface,"
            " so it cannot be watched: use the version of this model in transformers 5."
        )
    weights = torch.stack([rows[layer].to(device) for layer in wanted], 1)
    finite = logits.isfinite().all(-1) & weights.isfinite().flatten(1).all(1)
    pad = (encoded.key_kind == KeyKind.PAD).to(device)
    if encoded.source and bool(
        (weights.amax((1, 2)) * pad * inputs["attention_mask"][source]).any()
    ):
        raise ModelError(
            f"{target.name} looks at what comes after an answer, so the earlier answers of a"
            " conversation cannot be measured: use a model of a family that the documentation"
            " lists."
        )
    weights.masked_fill_(pad[:, None, None], 0.0)
    return AttentionRows(weights, encoded.key_kind, wanted, encoded.sample_id, finite)


def _queries(source: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For each prompt the place of its inputs in the batch, and its number among theirs."""
    place = torch.tensor(source)
    return place, torch.arange(len(place)) - torch.searchsorted(place, place)


def _usable(
    target: Target, batch: Sequence[Sample], on_skip: Callable[[Sample, RowError], None]
) -> Encoded | None:
    """Encode a batch without the samples that the model cannot take."""
    try:
        return target.encode(batch)
    except RowError:
        kept = []
        for sample in batch:
            try:
                target.encode([sample])
            except RowError as error:
                on_skip(sample, error)
            else:
                kept.append(sample)
    return target.encode(kept) if kept else None


def _chosen(target: Target, layers: Layers) -> tuple[int, ...]:
    if isinstance(layers, str):
        if layers != "all":
            raise UsageError(f"layers '{layers}' is not a choice: give 'all' or layer numbers.")
        return target.layers
    chosen = tuple(layers)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(target.layers):
        raise UsageError(
            f"layers {list(chosen)} are not distinct layers of {target.name}: choose from"
            f" {list(target.layers)}."
        )
    return chosen


def _last_logits(target: Target, inputs: dict[str, Tensor], last: Tensor) -> Tensor:
    """Run the prompt; next-token logits `(sample, vocabulary)` after the last real position."""
    options: dict[str, Any] = {"use_cache": False}
    positions = torch.tensor(sorted(set(last.tolist())))
    trims = target.trims_logits
    if trims:  # the language head over a whole prompt would cost more than the probe
        options["logits_to_keep"] = positions
        if positions.tolist() == [inputs["input_ids"].shape[1] - 1]:
            options["logits_to_keep"] = 1
    logits: Tensor = target.model(**inputs, **options).logits
    at = torch.searchsorted(positions, last.cpu()) if trims else last.cpu()
    return logits[torch.arange(len(at)), at].to(last.device)
