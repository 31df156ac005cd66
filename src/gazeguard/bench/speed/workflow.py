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
from peft import PeftModel
from PIL import Image

from gazeguard.bench.speed.instruments import Figure, Seconds, Spread, public_maps, ratio
from gazeguard.cleaning import clean
from gazeguard.cleaning.batches import batches
from gazeguard.data.read import open_dataset
from gazeguard.models.load import load

TOLERANCE = 1e-4  # nats

# Said in the JSON beside the numbers: what each side does for them.
SIDES = {
    "public": "loads the model (and adapter, unmerged), then row by row: template, processor,"
    " generate one token at batch 1 with eager attention and output_attentions, entropy of the"
    " image part; no statistics, no files",
    "clean": "the default command: loads, checks and fingerprints model and data, looks at every"
    " row, with an adapter a second time without it, saves blocks, judges, writes all files and"
    " the report",
    "bare": "the tuned model's forward passes alone, as batched by clean: sdpa, PyTorch's own"
    " choice of matrix library, one look, no probe; reading and encoding are not counted",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One way through the set.

    Attributes:
        entropy: nats, `(row, layer)`.
        seconds: from nothing in memory to the answer, by the clock on the wall.
        busy: the same in the processor's time for this process, which other programs on a busy
            machine do not lengthen.
        looking: the part of `busy` spent on rows: without loading, statistics and reports.
    """

    entropy: NDArray[np.float32]
    seconds: float
    busy: float
    looking: float


def public_way(
    folder: Path, data: Path, adapter: Path | None = None, limit: int | None = None
) -> Run:
    """What the papers' scripts do, without their mistakes: batch 1, `generate` one token, maps.

    For each row of a LLaVA JSON set: write the prompt with the model's template, generate one token
    with eager attention and `output_attentions=True`, take the last prompt position's row out of
    each layer's map, average heads, keep image tokens, renormalise, take the entropy. It stops
    there: no statistics, no files. float32, as `clean` uses on a CPU.
    """
    began, busy = time.perf_counter(), time.process_time()
    model = hf.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    processor = hf.AutoProcessor.from_pretrained(folder)
    looked = time.process_time()
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
            maps = public_maps(model, inputs)
        on_image = inputs["input_ids"][0] == model.config.image_token_id
        seen = torch.stack([layer[0, :, -1, on_image].mean(0) for layer in maps])
        found.append(torch.special.entr(seen / seen.sum(-1, keepdim=True)).sum(-1))
    now = time.process_time()
    return Run(torch.stack(found).numpy(), time.perf_counter() - began, now - busy, now - looked)


def our_way(
    folder: Path, data: Path, out: Path, adapter: Path | None = None, limit: int | None = None
) -> Run:
    """`clean` with its defaults, afresh: everything that its user waits for."""
    marks: list[float] = []
    began, busy = time.perf_counter(), time.process_time()
    done = clean(
        folder,
        data,
        out,
        adapter=adapter,
        resume=False,
        limit=limit,
        device="cpu",
        dtype="float32",
        progress=lambda rows, total: marks.append(time.process_time()),
    )
    spent, busy = time.perf_counter() - began, time.process_time() - busy
    return Run(done.profile.entropy, spent, busy, marks[-1] - marks[0])


def bare_seconds(folder: Path, data: Path, adapter: Path | None = None) -> float:
    """Processor seconds of the forward passes alone, batched as `clean` does."""
    target = load(folder, adapter, dtype="float32", device_map="cpu")
    rows = open_dataset(data)
    spent = 0.0
    whole = [(0, rows.count())]
    for batch in batches(rows.rows(), whole, target.encode, None, target.device, alike=True):
        for _, encoded in batch.parts:
            began = time.process_time()
            with torch.inference_mode():
                target.model(**encoded.inputs, use_cache=False, logits_to_keep=1)
            spent += time.process_time() - began
    return spent


def measure(
    name: str, folder: Path, data: Path, work: Path, repeats: int, adapter: Path | None = None
) -> tuple[list[Figure], dict[str, Any]]:
    """Lines of (c) for one model folder, and the raw numbers.

    Raises:
        AssertionError: the two ways do not give the same entropies, so they cannot be compared.
    """
    public_way(folder, data, adapter, limit=1)  # one-time set-up, for both
    our_way(folder, data, work / "warm", adapter, limit=1)
    public, ours, bare = [], [], []
    for turn in range(repeats):
        public.append(public_way(folder, data, adapter))
        ours.append(our_way(folder, data, work / str(turn), adapter))
        bare.append(bare_seconds(folder, data, adapter))
    entropy, rows = ours[0].entropy, len(ours[0].entropy)
    if entropy.shape != public[0].entropy.shape or np.ptp(entropy, axis=0).max() < 100 * TOLERANCE:
        raise AssertionError("the rows are too alike or too few to compare two ways")
    error = float(np.abs(entropy - public[0].entropy).max())
    if not error <= TOLERANCE:
        raise AssertionError(f"the two ways differ by {error:.1e} nats: they measure other things")
    runs = {"public": public, "clean": ours}
    whole: Seconds = {name: [run.seconds for run in made] for name, made in runs.items()}
    busy: Seconds = {name: [run.busy for run in made] for name, made in runs.items()}
    looking: Seconds = {name: [run.looking for run in made] for name, made in runs.items()}
    what = f"clean / public way, {name}, {rows} rows"
    floor = f"bare forward / public way, {name}: rows per processor second, loading aside"
    figures = [
        Figure(f"public way, {name}", "rows/s", Spread.of([rows / s for s in whole["public"]])),
        Figure(f"clean, {name}", "rows/s", Spread.of([rows / s for s in whole["clean"]])),
        Figure(f"{what}: rows/s", "x", ratio(*whole.values()), at_least=5),
        Figure(f"{what}: rows per processor second", "x", ratio(*busy.values())),
        Figure(floor, "x", ratio(looking["public"], bare)),
    ]
    return figures, {
        "sides": SIDES,
        "rows": rows,
        "looks": 1 if adapter is None else 2,
        "seconds": whole,
        "processor_seconds": busy,
        "processor_seconds_looking": {**looking, "bare": bare},
        "largest_difference": error,
    }
