"""`clean` from start to end, beside the public way of getting the same entropies."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from numpy.typing import NDArray
from PIL import Image

from gazeguard.bench.speed.instruments import Figure, Seconds, Spread, ratio
from gazeguard.cleaning import clean

TOLERANCE = 1e-4  # nats


@dataclass(frozen=True, slots=True)
class Run:
    """One way through the set.

    Attributes:
        entropy: nats, `(row, layer)`.
        seconds: from nothing in memory to the answer.
        looking: the share of these spent on rows: without loading, statistics and reports.
    """

    entropy: NDArray[np.float32]
    seconds: float
    looking: float


def public_way(folder: Path, data: Path, limit: int | None = None) -> Run:
    """What the papers' scripts do, without their mistakes: batch 1, `generate` one token, maps.

    For each row of a LLaVA JSON set: write the prompt with the model's template, generate one token
    with eager attention and `output_attentions=True`, take the last prompt position's row out of
    each layer's map, average heads, keep image tokens, renormalise, take the entropy. It stops
    there: no statistics, no files. float32, as `clean` uses on a CPU.
    """
    began = time.perf_counter()
    model = hf.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = hf.AutoProcessor.from_pretrained(folder)
    looked = time.perf_counter()
    found = []
    for item in json.loads(data.read_text("utf-8"))[:limit]:
        with Image.open(data.parent / item["image"]) as picture:
            image = picture.convert("RGB")
        question = item["conversations"][0]["value"].removeprefix("<image>\n")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text, images=image, return_tensors="pt")
        with torch.inference_mode():
            maps = model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                output_attentions=True,
                return_dict_in_generate=True,
            ).attentions[0]
        on_image = inputs["input_ids"][0] == model.config.image_token_id
        seen = torch.stack([layer[0, :, -1, on_image].mean(0) for layer in maps])
        found.append(torch.special.entr(seen / seen.sum(-1, keepdim=True)).sum(-1))
    now = time.perf_counter()
    return Run(torch.stack(found).numpy(), now - began, now - looked)


def our_way(folder: Path, data: Path, out: Path, limit: int | None = None) -> Run:
    """`clean` with its defaults, afresh: everything that its user waits for."""
    marks: list[float] = []
    began = time.perf_counter()
    done = clean(
        folder,
        data,
        out,
        resume=False,
        limit=limit,
        device="cpu",
        dtype="float32",
        progress=lambda rows, total: marks.append(time.perf_counter()),
    )
    ended = time.perf_counter()
    return Run(done.profile.entropy, ended - began, marks[-1] - marks[0])


def measure(
    name: str, folder: Path, data: Path, work: Path, repeats: int
) -> tuple[list[Figure], dict[str, Any]]:
    """Lines of (c) for one model folder, and the raw numbers.

    Raises:
        AssertionError: the two ways do not give the same entropies, so they cannot be compared.
    """
    public_way(folder, data, limit=1)  # one-time set-up, for both
    our_way(folder, data, work / "warm", limit=1)
    public, ours = [], []
    for turn in range(repeats):
        public.append(public_way(folder, data))
        ours.append(our_way(folder, data, work / str(turn)))
    entropy, rows = ours[0].entropy, len(ours[0].entropy)
    if entropy.shape != public[0].entropy.shape or np.ptp(entropy, axis=0).max() < 100 * TOLERANCE:
        raise AssertionError("the rows are too alike or too few to compare two ways")
    error = float(np.abs(entropy - public[0].entropy).max())
    if not error <= TOLERANCE:
        raise AssertionError(f"the two ways differ by {error:.1e} nats: they measure other things")
    whole: Seconds = {"public": [r.seconds for r in public], "clean": [r.seconds for r in ours]}
    looking: Seconds = {"public": [r.looking for r in public], "clean": [r.looking for r in ours]}
    what = f"clean / public way, {name}, {rows} rows"
    figures = [
        Figure(f"public way, {name}", "rows/s", Spread.of([rows / s for s in whole["public"]])),
        Figure(f"clean, {name}", "rows/s", Spread.of([rows / s for s in whole["clean"]])),
        Figure(f"{what}: rows/s", "x", ratio(whole["public"], whole["clean"]), at_least=5),
        Figure(f"{what}: without loading and reports", "x", ratio(*looking.values())),
    ]
    return figures, {
        "rows": rows,
        "seconds": whole,
        "looking": looking,
        "largest_difference": error,
    }
