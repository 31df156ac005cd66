"""One forward pass: plain sdpa, with the probe, and with the whole maps of eager attention."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from gazeguard.bench.speed.instruments import (
    MIB,
    Figure,
    Seconds,
    Spread,
    in_child,
    interleave,
    peak_added,
    ratio,
)
from gazeguard.lab import tiny
from gazeguard.models.load import load
from gazeguard.models.target import Encoded, ImageTokens, Target
from gazeguard.probe.attention import attend
from gazeguard.types import KeyKind

TEXT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of one run; the defaults are those of the published figures."""

    grid: int = 24  # image tokens a side: 576, as in LLaVA-1.5
    layers: int = 8
    hidden: int = 256
    heads: int = 8
    tokens: tuple[int, ...] = (600, 2300)
    batch: int = 4
    repeats: int = 5
    maps_repeats: int = 3  # of the slow eager passes
    memory_repeats: int = 2


def random_llava(folder: Path, size: Size) -> Path:
    """Write a random LLaVA of the given size, with the processor and template of the tiny one.

    The vision tower stays small: what is compared is the language side.
    """
    tiny.build("llava", folder)
    config = hf.LlavaConfig.from_pretrained(folder)
    processor = hf.AutoProcessor.from_pretrained(folder)
    side = size.grid * processor.patch_size
    config.image_seq_length = size.grid**2
    config.vision_config.image_size = side
    text = config.text_config
    text.num_hidden_layers, text.hidden_size = size.layers, size.hidden
    text.intermediate_size = size.hidden * 11 // 4
    text.num_attention_heads, text.num_key_value_heads = size.heads, size.heads // 2
    text.head_dim, text.max_position_embeddings = size.hidden // size.heads, 4096
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = hf.LlavaForConditionalGeneration(config)
        for weight in model.parameters():
            if weight.ndim > 1:  # default weights give flat attention, which hides mistakes
                weight.normal_(0.0, weight.shape[-1] ** -0.5)
    model.generation_config = hf.GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def measure(folder: Path, size: Size, threads: int) -> tuple[list[Figure], dict[str, Any]]:
    """Lines (a) probe against plain sdpa and (b) probe against eager maps, and the raw numbers."""
    target = load(folder)
    seconds: dict[str, Seconds] = {}
    for tokens in size.tokens:
        encoded = prompt(size.batch, tokens)
        runs: dict[str, Callable[[], object]] = {
            "plain": plain(target, encoded),
            "probe": partial(attend, target, encoded),
        }
        seconds[f"{tokens} tokens"] = interleave(runs, size.repeats)
    longest = max(size.tokens)
    single = prompt(1, longest)
    maps = eager_maps(folder, single)
    error = float((maps() - attend(target, single).weights[:, :, 0]).abs().max())
    if not error <= 1e-5:
        raise AssertionError(f"probe and eager maps differ by {error:.1e}: nothing to compare")
    runs = {"maps": maps, "probe": partial(attend, target, single)}
    seconds["maps"] = interleave(runs, size.maps_repeats)
    arguments = {
        "folder": str(folder),
        "tokens": size.tokens,
        "batch": size.batch,
        "repeats": size.memory_repeats,
        "threads": threads,
    }
    peaks = in_child("gazeguard.bench.speed.forward", arguments, threads)
    figures = []
    for tokens in size.tokens:
        key, what = f"{tokens} tokens", f"probe / plain sdpa, {tokens:,} tokens, batch {size.batch}"
        took = seconds[key]
        figures.append(
            Figure(f"{what}: time", "x", ratio(took["probe"], took["plain"]), at_most=1.10)
        )
        memory = _memory_ratio(peaks[key], "probe", "plain")
        figures.append(Figure(f"{what}: added peak memory", "x", memory, at_most=1.05))
    what = f"eager + output_attentions / probe, {longest:,} tokens, batch 1"
    took = seconds["maps"]
    figures.append(Figure(f"{what}: time", "x", ratio(took["maps"], took["probe"]), at_least=4))
    memory = _memory_ratio(peaks["maps"], "maps", "probe")
    figures.append(Figure(f"{what}: added peak memory", "x", memory, at_least=10))
    return figures, {"seconds": seconds, "added_peak_MiB": peaks, "largest_difference": error}


def prompt(batch: int, tokens: int) -> Encoded:
    """Random language-side input; words stand for the patches, as the tower is not compared."""
    made = torch.Generator().manual_seed(tokens)
    ids = torch.randint(4, 256, (batch, tokens), generator=made)
    kind = torch.full((batch, tokens), KeyKind.PROMPT, dtype=torch.int8)
    kind[:, TEXT_TOKENS // 2 : tokens - TEXT_TOKENS // 2] = KeyKind.IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = (ImageTokens(int((kind[0] == KeyKind.IMAGE).sum())),)
    return Encoded(inputs, kind, tuple(map(str, range(batch))), (images,) * batch)


def plain(target: Target, encoded: Encoded) -> Callable[[], Tensor]:
    """The pass that anybody pays: the model's own kernel, next-token logits only."""

    def run() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = target.model(
                **encoded.inputs, use_cache=False, logits_to_keep=1
            ).logits
            return logits

    return run


def eager_maps(folder: Path, encoded: Encoded) -> Callable[[], Tensor]:
    """The public way to the same rows `(sample, layer, key)`: every layer's whole map."""
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    model.eval()

    def run() -> Tensor:
        with torch.inference_mode():
            maps = model(
                **encoded.inputs, use_cache=False, logits_to_keep=1, output_attentions=True
            ).attentions
            return torch.stack([layer[:, :, -1].mean(1) for layer in maps], 1)

    return run


def _memory_ratio(peaks: Mapping[str, list[float] | None], above: str, below: str) -> Spread | None:
    over, under = peaks[above], peaks[below]
    return None if over is None or under is None else ratio(over, under)


def _child(arguments: Mapping[str, Any]) -> dict[str, dict[str, list[float] | None]]:
    """Added peaks in MiB; weights and inputs are there before, so they count for no variant."""
    torch.set_num_threads(arguments["threads"])
    folder, repeats = Path(arguments["folder"]), arguments["repeats"]
    target = load(folder)
    peaks = {}
    for tokens in arguments["tokens"]:
        encoded = prompt(arguments["batch"], tokens)
        peaks[f"{tokens} tokens"] = {
            "plain": _peaks(plain(target, encoded), repeats),
            "probe": _peaks(partial(attend, target, encoded), repeats),
        }
    single = prompt(1, max(arguments["tokens"]))
    probed = _peaks(partial(attend, target, single), repeats)
    peaks["maps"] = {"probe": probed, "maps": _peaks(eager_maps(folder, single), repeats)}
    return peaks


def _peaks(run: Callable[[], object], repeats: int) -> list[float] | None:
    run()
    found = [peak_added(run) for _ in range(repeats)]
    return None if None in found else [f / MIB for f in found if f is not None]


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
