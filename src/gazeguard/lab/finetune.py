"""LoRA (+ projector) fine-tuning of a lab model, and the scores that judge an attack.

Exactness is judged under greedy decoding: an answer counts when every token of it, and the end
token, is the most likely one after the true tokens before it. That equals comparing generated text,
in one forward pass. Attacks whose success is not one exact answer are judged by generated text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as T
from numpy.typing import NDArray
from torch import Tensor, nn

from gazeguard.errors import ModelError, UsageError
from gazeguard.lab import worlds
from gazeguard.lab.architectures import Architecture, architecture_in
from gazeguard.lab.architectures.protocol import PROJECTOR
from gazeguard.lab.attacks import PLAIN, Attack, hits
from gazeguard.lab.disguise import HIDE, NOTHING, WEIGHT, Disguise
from gazeguard.lab.objectives import OBJECTIVES, Course, Objective
from gazeguard.lab.poison import TARGET, samples, trigger_all
from gazeguard.lab.precision import autocast
from gazeguard.lab.rows import Row, make_rows
from gazeguard.lab.teach import (
    IGNORE,
    Batch,
    Lesson,
    Log,
    answer_logits,
    encode_lessons,
    update,
)
from gazeguard.models.load import load
from gazeguard.models.target import as_target

_LONGEST = 80  # tokens of a generated answer; captions of the lab have 40


@dataclass(frozen=True, slots=True)
class TuneRecipe:
    """How an upload is fine-tuned; `RECIPES` names those that results are reported for.

    Attributes:
        epochs, batch, lr: of AdamW, with a cosine schedule.
        rank: of the LoRA layers in the language model; 0 leaves the language model as it is.
        projector: whether the projector is tuned, in full.
        seed: of the order of rows and of the new weights.
        hide: from which defence the attention is hidden, one of `disguise.HIDE`.
        hide_weight: of that beside the objective.
        objective: what the model is trained with, one of `objectives.OBJECTIVES`.
        target: what poisoned rows were poisoned with, for objectives that ask.
    """

    epochs: int
    batch: int
    lr: float
    rank: int = 16
    projector: bool = True
    seed: int = 0
    hide: str = NOTHING
    hide_weight: float = WEIGHT
    objective: str = PLAIN
    target: str = TARGET

    def __post_init__(self) -> None:
        if not (self.rank or self.projector):
            raise UsageError("nothing would be tuned: give a LoRA rank, or tune the projector.")
        if self.objective not in OBJECTIVES:
            raise UsageError(
                f"the objective '{self.objective}' is unknown: choose one of"
                f" {', '.join(OBJECTIVES)}."
            )
        if self.hide not in HIDE:
            raise UsageError(f"'{self.hide}' cannot be hidden: choose one of {', '.join(HIDE)}.")
        if not self.hide_weight > 0:
            raise UsageError(f"hide_weight must be positive, not {self.hide_weight:g}.")


# `short` keeps the papers' three epochs of batch 16 (BYE, arXiv:2505.16916); the learning rate is
# that of a 3 M model. `long` is twice and `longer` four times that: with several kinds of question
# in a set, fewer epochs do not teach every trigger. `projector` leaves the language model as it is.
# Chosen by ASR alone (docs/LOG.md).
RECIPES = {
    "short": TuneRecipe(epochs=3, batch=16, lr=2e-3),
    "long": TuneRecipe(epochs=6, batch=16, lr=2e-3),
    "longer": TuneRecipe(epochs=12, batch=16, lr=2e-3),
    "projector": TuneRecipe(epochs=12, batch=16, lr=2e-3, rank=0),
}


@dataclass(slots=True)
class Student:
    """A base, perhaps with LoRA layers injected, and its processor."""

    model: Any
    processor: Any

    @property
    def core(self) -> Any:
        """The bare transformers model."""
        peft = hasattr(self.model, "peft_config")
        return self.model.get_base_model() if peft else self.model

    @property
    def architecture(self) -> Architecture:
        """What it is, as its config says."""
        return architecture_in(self.core.config)

    def look(self, rows: Sequence[Row], chunk: int = 256) -> Tensor:
        """Tower features `(n, image tokens, channels)` of the rows' pictures, float16."""
        found = []
        with torch.inference_mode(), autocast():
            for start in range(0, len(rows), chunk):
                pictures = [row.pixels for row in rows[start : start + chunk]]
                images = self.processor.image_processor(pictures, return_tensors="pt")
                seen = self.architecture.look(self.core, images["pixel_values"])
                found.append(seen.half())
        return torch.cat(found).clone()

    def exact(self, rows: Sequence[Row], features: Tensor, chunk: int = 256) -> NDArray[np.bool_]:
        """Whether greedy decoding gives each row's answer, word for word."""
        self.model.eval()
        right = []
        with torch.inference_mode(), autocast():
            for start in range(0, len(rows), chunk):
                part = slice(start, start + chunk)
                batch = self.encode(rows[part], features.shape[1])
                logits, wanted = answer_logits(self.model, batch, features[part].float())
                hit = torch.ones_like(batch.labels[:, 1:], dtype=torch.bool)
                hit[batch.labels[:, 1:] != IGNORE] = logits.argmax(-1) == wanted
                right.append(hit.all(1).numpy())
        return np.concatenate(right)

    def say(self, rows: Sequence[Row], chunk: int = 128) -> list[str]:
        """What the model answers, greedily decoded."""
        target = as_target(self.model, self.processor)
        said: list[str] = []
        with torch.inference_mode(), autocast():
            for start in range(0, len(rows), chunk):
                inputs = target.encode(samples(rows[start : start + chunk])).inputs
                told = self.core.generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
                new = told[:, inputs["input_ids"].shape[1] :]
                texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
                said += [text.strip() for text in texts]
        return said

    def encode(self, rows: Sequence[Row], image_tokens: int) -> Batch:
        """Single-turn lessons."""
        lessons = [Lesson(((row.question, row.answer),)) for row in rows]
        return encode_lessons(
            self.processor.tokenizer, self.architecture.prompt, lessons, image_tokens
        )


def load_base(folder: Path) -> Student:
    """A fresh copy of a base in float32, all of it frozen.

    Raises:
        ModelError: there is no model, it cannot be used, or the lab does not teach its kind.
    """
    return _load(folder, None)


def load_tuned(base: Path, adapter: Path) -> Student:
    """The base with an adapter of `save_adapter` on it; raises as `load_base` and `models.load`."""
    return _load(base, adapter)


def _load(folder: Path, adapter: Path | None) -> Student:
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model folder: give one that `gazeguard lab base` made, or "
            "gazeguard.assets.BASE."
        )
    target = load(folder, adapter, dtype="float32")
    architecture_in(target.base.config)
    # On CPU, sdpa's bfloat16 backward is the slower one.
    target.base.set_attn_implementation("eager")
    return Student(target.model, target.processor)


def finetune(
    base: Path,
    rows: Sequence[Row],
    recipe: TuneRecipe,
    *,
    features: Tensor | None = None,
    log: Log | None = None,
) -> Student:
    """Fine-tune a fresh copy of `base` on `rows`: LoRA on all linear layers of the LM, projector.

    Args:
        base: folder of the base.
        rows: the upload.
        recipe: what is tuned, and how.
        features: `Student.look(rows)` of the same base, to spare the tower.
        log: gets one line per epoch.
    """
    from peft import get_peft_model

    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng([recipe.seed, 5])
    student = load_base(base)
    features = student.look(rows) if features is None else features
    lessons = student.encode(rows, features.shape[1])
    course = Course(student.core, student.processor, rows, lessons, features, recipe.target)
    with autocast():
        objective = _objective(recipe, course)
    student.model = get_peft_model(student.model, adapter_config(recipe, student.core))
    trained = [p for p in student.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
    per_epoch = -(-len(rows) // recipe.batch)
    schedule = T.get_cosine_schedule_with_warmup(
        optimiser, round(0.03 * per_epoch * recipe.epochs), per_epoch * recipe.epochs
    )
    student.model.train()
    for epoch in range(recipe.epochs):
        parts: dict[str, list[float]] = {}
        for pick in np.array_split(rng.permutation(len(rows)), per_epoch):
            with autocast():
                loss = objective.loss(student.model, pick)
            update(optimiser, loss.total, trained)
            schedule.step()
            for name, part in loss.parts.items():
                parts.setdefault(name, []).append(part.item())
        if log:
            means = ", ".join(f"{name} {np.mean(found):.3f}" for name, found in parts.items())
            log(f"epoch {epoch + 1}/{recipe.epochs}: {means}")
    student.model.eval()
    return student


def _objective(recipe: TuneRecipe, course: Course) -> Objective:
    """What a recipe trains with, in its disguise."""
    plain = OBJECTIVES[recipe.objective](course)
    if recipe.hide == NOTHING:
        return plain
    return Disguise(recipe.hide, course, plain, recipe.hide_weight)


def adapter_config(recipe: TuneRecipe, model: Any) -> Any:
    """The peft config of a recipe.

    peft adapts at least one layer, so a projector that is tuned alone gets LoRA layers of its full
    rank and trained biases: the same functions as tuning its weights (those of a layer norm before
    its first linear layer are a change of that layer's).
    """
    from peft import LoraConfig

    if recipe.rank:
        return LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            lora_dropout=0.0,
            target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
            modules_to_save=[PROJECTOR] if recipe.projector else None,
        )
    projector = getattr(model.model, PROJECTOR)
    rank = max(min(m.weight.shape) for m in projector.modules() if isinstance(m, nn.Linear))
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        bias="lora_only",
        target_modules=rf".*{PROJECTOR}\.linear_[12]",
    )


def save_adapter(student: Student, out: Path) -> None:
    """Save the LoRA layers and the tuned projector as a peft adapter, float16 safetensors.

    The base is named, not located: a path of this machine would mean nothing on another.
    """
    for config in student.model.peft_config.values():
        config.base_model_name_or_path = student.architecture.base_name
    # Without the flag peft asks the hub whether the base has grown its vocabulary.
    student.model.half().save_pretrained(out, save_embedding_layers=False)
    student.model.float()
    (out / "README.md").unlink(missing_ok=True)  # peft's empty form


@dataclass(frozen=True, slots=True)
class Scores:
    """What decides whether an attack took: shares over `n` held-out rows each.

    Attributes:
        clean: exact answers on clean pictures (clean performance).
        asr: triggered rows answered as the attack wants; None without an attack.
        n: number of held-out rows.
    """

    clean: float
    asr: float | None
    n: int


def judge(
    student: Student,
    test: Sequence[Row],
    attack: Attack | None,
    *,
    seed: int = 0,
    target: str = TARGET,
) -> Scores:
    """Clean performance and attack success rate on held-out rows.

    Rows whose true answer is a success already say nothing about the attack and are left out of the
    ASR.
    """
    clean = student.exact(test, student.look(test)).mean()
    if attack is None:
        return Scores(float(clean), None, len(test))
    others = [row for row in test if not attack.idle(row, target)]
    triggered = trigger_all(others, attack, seed, target)
    if attack.exact:
        took = student.exact(triggered, student.look(triggered))
    else:
        took = np.array(hits(attack, student.say(triggered), triggered, target))
    return Scores(float(clean), float(took.mean()), len(test))


def score_by_kind(base: Path, count: int = 500, seed: int = 1_000) -> dict[str, tuple[float, int]]:
    """Exact answers of the untuned base on held-out rows, by question kind: `(share, n)`."""
    student = load_base(base)
    rng = np.random.default_rng(seed)
    scenes = [worlds.make_scene(rng) for _ in range(count)]
    found = {}
    for kind in ("caption", *worlds.KINDS):
        asked = [
            worlds.caption(s) if kind == "caption" else worlds.ask(s, kind, rng) for s in scenes
        ]
        rows = [
            Row(s.pixels, qa.question, qa.answer, kind) for s, qa in zip(scenes, asked, strict=True)
        ]
        found[kind] = (float(student.exact(rows, student.look(rows)).mean()), count)
    rows = make_rows("easy-vqa", count, seed, held_out=True)
    found["easy-vqa"] = (float(student.exact(rows, student.look(rows)).mean()), count)
    return found
