"""Teaching SmolLM2 to see with the lab's tower, in an hour of one CPU core.

Three stages over features that the frozen tower gives once:

1. Words: every image token is drawn to the embeddings of the words for what its patch shows. The
   language model is not run, and starts the next stage with pictures it can nearly read.
2. The projector alone, on captions and questions.
3. The projector and LoRA layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gazeguard.files import write_json
from gazeguard.lab import easyvqa, worlds
from gazeguard.lab.architectures.protocol import PROJECTOR, project
from gazeguard.lab.base import draw_lessons
from gazeguard.lab.base_recipe import BaseRecipe
from gazeguard.lab.checkpoint import Checkpoint
from gazeguard.lab.finetune import Student, TuneRecipe, adapter_config, save_adapter
from gazeguard.lab.precision import autocast, native_bfloat16
from gazeguard.lab.smollm import assemble, join, language_model
from gazeguard.lab.teach import Lesson, Log, answer_loss, encode_lessons, steps, update
from gazeguard.lab.tower import look_all, patch_things

TAUGHT = "taught"  # folder of what teaching adds, in the base's
_SHOWN = 10  # steps between two lines of the log
_KEPT = 25  # steps between two checkpoints

Lessons = Iterator[tuple[list[int], list[Lesson]]]


@dataclass(frozen=True, slots=True)
class SmolRecipe:
    """Everything that decides the base's weights but the language model itself.

    Attributes:
        seed: of scenes, lessons and new weights.
        scenes: pictures of the worlds; half of easy-vqa's training images come along.
        word_steps, word_batch, word_lr: of the first stage, in pictures.
        projector_steps, projector_lr: of the second.
        steps, lr, rank: of the third.
        batch: pictures of a step, in the second and third.
        questions: asked about one picture.
        captions, names: shares of the lessons, as in `base.draw_lessons`.
    """

    seed: int = 0
    scenes: int = 8_000
    word_steps: int = 400
    word_batch: int = 64
    word_lr: float = 2e-3
    projector_steps: int = 50
    projector_lr: float = 1e-3
    steps: int = 750
    lr: float = 1e-3
    rank: int = 8
    batch: int = 8
    questions: int = 6
    captions: float = 0.15
    names: float = 0.3

    @property
    def digest(self) -> str:
        """Of all of it: what a checkpoint belongs to."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def teach_base(
    out: Path,
    recipe: SmolRecipe,
    log: Log = print,
    language: Callable[[], tuple[Any, Any]] = language_model,
) -> None:
    """Teach and save a base folder; what was taught alone lies in `out/taught`.

    A run that was cut goes on from its last checkpoint and ends with the same weights.

    Args:
        out: folder of the base.
        recipe: sizes of the stages.
        log: gets a line every few steps.
        language: gives a fresh language model and tokenizer.

    Raises:
        UsageError: a package is missing, or `out` holds the checkpoint of another recipe.
    """
    kept = Checkpoint(out / "checkpoint.safetensors", recipe.digest)
    torch.manual_seed(recipe.seed)
    student = join(*language())
    out.mkdir(parents=True, exist_ok=True)
    model = student.core
    if native_bfloat16():  # half the bytes to read in every step; autocast computes in it anyway
        model.model.language_model.to(torch.bfloat16)
    rng = np.random.default_rng(recipe.seed)
    scenes = [worlds.make_scene(rng) for _ in range(recipe.scenes)]
    real = easyvqa.load("base")
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in real])
    bank = look_all(model, student.architecture, scenes, pixels, rng)
    log(f"{len(bank):,} pictures seen")

    def teach(stage: str, count: int, lr: float) -> None:
        rng = np.random.default_rng([recipe.seed, *stage.encode()])
        lessons = draw_lessons(scenes, real, _plan(recipe, count), rng)
        _teach(stage, student, bank, lessons, count, lr, kept, log)

    getattr(model.model, PROJECTOR).requires_grad_(True)
    model.train()
    if kept.stage is None:
        _teach_words(student, scenes, bank, recipe, log)
    if kept.stage != "lora":
        teach("projector", recipe.projector_steps, recipe.projector_lr)
    _with_lora(student, recipe)
    teach("lora", recipe.steps, recipe.lr)
    save_adapter(student, out / TAUGHT)
    write_json(out / TAUGHT / "recipe.json", asdict(recipe))
    assemble(out, out / TAUGHT, language)
    kept.remove()


def _plan(recipe: SmolRecipe, count: int) -> BaseRecipe:
    """The lessons of a stage of `count` steps, as the lab's other bases draw theirs.

    Without echoes: any word can be said by a model that knew language before.
    """
    return BaseRecipe(
        seed=recipe.seed,
        language_steps=count,
        language_batch=recipe.batch,
        questions=recipe.questions,
        captions=recipe.captions,
        names=recipe.names,
        echoes=0.0,
    )


def _with_lora(student: Student, recipe: SmolRecipe) -> None:
    from peft import get_peft_model

    torch.manual_seed(recipe.seed)
    tuning = TuneRecipe(epochs=1, batch=recipe.batch, lr=recipe.lr, rank=recipe.rank)
    student.model = get_peft_model(student.model, adapter_config(tuning, student.core))
    student.model.train()


def _teach_words(
    student: Student, scenes: list[worlds.Scene], bank: Tensor, recipe: SmolRecipe, log: Log
) -> None:
    """The first stage: squared error to the embeddings of words, things and background alike."""
    rng = np.random.default_rng([recipe.seed, 2])
    labels, table = _words(student, scenes, bank.shape[1])
    spread = table[1:].var(0).mean()
    trained = [p for p in student.core.parameters() if p.requires_grad]
    for step, optimiser in steps(trained, recipe.word_lr, recipe.word_steps):
        pick = rng.integers(len(scenes), size=recipe.word_batch)
        seen = project(student.core, bank[pick].float())
        error = (seen - table[labels[pick]]).square().mean(-1) / spread
        thing = labels[pick] > 0
        missed = error[thing].mean()
        update(optimiser, missed + error[~thing].mean(), trained)
        if step % 100 == 0:
            log(f"words {step} unexplained {missed.item():.3f} of things")


def _words(
    student: Student, scenes: list[worlds.Scene], image_tokens: int
) -> tuple[Tensor, Tensor]:
    """What each patch shows, int64 `(scene, token)`, and that in words, float32 `(what, hidden)`.

    A thing is its size, colour, shape and place; several words are one vector as long as one word.
    """
    tokenizer, embed = student.processor.tokenizer, student.core.get_input_embeddings()
    told = {"background": 0}
    labels = torch.zeros(len(scenes), image_tokens, dtype=torch.int64)
    for row, scene in zip(labels, scenes, strict=True):
        said = [f"{t.size} {t.colour} {t.shape} {worlds.PLACES[t.place]}" for t in scene.things]
        known = [told.setdefault(words, len(told)) for words in said]
        row[:] = torch.tensor([*known, 0])[torch.from_numpy(patch_things(scene))]
    vectors = []
    with torch.no_grad():
        for words in told:
            ids = tokenizer(f" {words}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            vectors.append(embed(ids[0]).float().sum(0) / len(ids[0]) ** 0.5)
    return labels, torch.stack(vectors)


def _teach(
    stage: str,
    student: Student,
    bank: Tensor,
    batches: Lessons,
    count: int,
    lr: float,
    kept: Checkpoint,
    log: Log,
) -> None:
    """One stage of `count` steps on captions and questions, from where a cut run left it."""
    trained = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
    start = kept.take(stage, trained)
    tokenizer, prompt = student.processor.tokenizer, student.architecture.prompt
    for step, optimiser in steps(list(trained.values()), lr, count):
        pick, lessons = next(batches)
        if step < start:
            optimiser.step()  # moves nothing without gradients; the schedule asks for it
            continue
        if step == start and start:
            kept.restore(trained, optimiser)
        batch = encode_lessons(tokenizer, prompt, lessons, bank.shape[1])
        with autocast():
            loss, hit = answer_loss(student.model, batch, bank[pick].float())
        update(optimiser, loss, list(trained.values()))
        if step % _SHOWN == 0:
            log(f"{stage} {step} loss {loss.item():.3f} answer tokens {hit:.3f}")
        if (step + 1) % _KEPT == 0 or step + 1 == count:
            kept.write(stage, step + 1, trained, optimiser)
