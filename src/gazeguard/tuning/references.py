"""Benign fine-tunes of a base with a suspect's own kind of adapter, kept by content.

A reference should differ from a suspect in nothing but the backdoor: the adapter's configuration is
the suspect's, tuning stops when its weights have moved about as far as the suspect's, and data,
order, learning rate and length vary from one reference to the next.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gazeguard.errors import ModelError
from gazeguard.files import whole_folder, write_json
from gazeguard.models.offload import offloads
from gazeguard.models.target import Target
from gazeguard.tuning.lesson import answer_loss
from gazeguard.types import Sample

_WIDTH, _LEARNING_RATE = 4096, 2e-4  # usual for LoRA of a 7 B model; smaller models take more
_LOOK = 5  # steps between two looks at how far the weights have moved
_WARM_UP = 0.05


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one reference is tuned.

    Attributes:
        seed: of its weights, data and order.
        lr: of AdamW, warmed up and then constant.
        share: of the rows that it is tuned on.
        steps: at most so many.
        batch: rows of a step.
        distance: stop when its weights have moved so far (see `moved`); None for all steps.
    """

    seed: int
    lr: float
    share: float
    steps: int
    batch: int = 8
    distance: float | None = None


def recipes(
    count: int, width: int, *, steps: int, distance: float | None, seed: int = 0
) -> list[Recipe]:
    """Recipes that differ in seed, learning rate (by up to 4), rows (a half to all) and length.

    The first of a longer list are those of a shorter one.

    Args:
        count: how many.
        width: hidden size of the language model; the learning rate goes with its inverse root.
        steps: at most so many each.
        distance: how far the suspect moved; each stops somewhere between 0.6 and 1.4 of it.
        seed: of all draws.
    """
    found = []
    for number in range(count):
        rng = np.random.default_rng([seed, number, 23])
        lr = _LEARNING_RATE * (_WIDTH / width) ** 0.5 * 2 ** rng.uniform(-1, 1)
        share, length, far = rng.uniform([0.5, 0.5, 0.6], [1.0, 1.0, 1.4])
        found.append(
            Recipe(
                seed=1000 * seed + number,
                lr=float(f"{lr:.3g}"),
                share=round(float(share), 2),
                steps=max(1, round(steps * float(length))) if distance is None else steps,
                distance=None if distance is None else float(f"{distance * far:.4g}"),
            )
        )
    return found


def suspect_config(adapter: Path) -> Any:
    """The peft configuration of an adapter, ready to be tuned anew.

    Raises:
        ModelError: it cannot be read.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(adapter)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(
            f"{adapter}/adapter_config.json cannot be used: copy the adapter again."
        ) from error
    config.inference_mode = False
    config.base_model_name_or_path = None
    return config


def whole_model_config(target: Target, changed: Sequence[str], projector_only: bool) -> Any:
    """A LoRA configuration that stands in for a fine-tune without an adapter.

    The linear layers that changed get LoRA layers: of rank 16, or, where the projector alone was
    tuned, of its full rank (the same functions as tuning its weights).

    Args:
        target: the base.
        changed: names of tensors that differ between suspect and base.
        projector_only: whether they all lie in the projector.

    Raises:
        ModelError: no linear layer changed.
    """
    from peft import LoraConfig

    ends = tuple(name.removesuffix(".weight").split(".", 1)[-1] for name in changed)
    linear = {
        name: module
        for name, module in target.base.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ends)
    }
    if not linear:
        raise ModelError(
            f"no linear layer of {target.name} was tuned, so no reference of this kind can be"
            " made: give benign fine-tunes with --reference."
        )
    smallest = min(min(module.weight.shape) for module in linear.values())
    rank = smallest if projector_only else min(16, smallest)
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=sorted(linear), lora_dropout=0.0, bias="none"
    )


@torch.no_grad()
def moved(model: Any) -> float:
    """How far an adapter moved its base: root of the summed squares of all weight differences.

    Biases are left out.
    """
    total = 0.0
    for module in model.modules():
        if hasattr(module, "get_delta_weight") and getattr(module, "active_adapters", None):
            for name in module.active_adapters:
                total += float(module.get_delta_weight(name).float().square().sum())
        if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            before = dict(module.original_module.named_parameters())
            for copy in module.modules_to_save.values():
                for name, after in copy.named_parameters():
                    total += float((after - before[name]).float().square().sum())
    return float(total**0.5)


def make_reference(
    base: Target,
    config: Any,
    rows: Sequence[Sample],
    answers: Sequence[list[int]],
    recipe: Recipe,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Tune a fresh copy of an adapter on benign rows and save it, whole or not at all.

    Args:
        base: the bare base model; it is used up.
        config: peft configuration.
        rows: benign rows.
        answers: their answers as tokens.
        recipe: how.
        out: the adapter's folder; one that exists is taken as it is.
        progress: called with steps done and steps in all.

    Raises:
        ModelError: the configuration does not fit the base, the base is kept off its device
            between passes, or tuning ends in NaN.
    """
    if out.is_dir():
        return out
    if offloads(base.base):
        raise ModelError(
            f"{base.name} does not fit on the device as a whole, so it cannot be fine-tuned there:"
            " give benign fine-tunes with --reference."
        )
    from peft import get_peft_model

    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng([recipe.seed, 29])
    try:
        model = get_peft_model(base.base, config)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"no adapter like the suspect's can be put on {base.name}"
            f" ({str(error).splitlines()[0]}): give benign fine-tunes with --reference."
        ) from error
    target = replace(base, model=model)
    _tune(target, rows, answers, recipe, rng, progress)
    if not np.isfinite(moved(model)):
        raise ModelError(
            f"tuning {base.name} with a learning rate of {recipe.lr:g} ended in numbers that are"
            " not finite: use --dtype float32."
        )
    with whole_folder(out) as part:
        # Without the flag peft asks the hub whether the base has grown its vocabulary.
        model.save_pretrained(part, save_embedding_layers=False)
        write_json(part / "recipe.json", asdict(recipe))
    del model, target
    gc.collect()
    return out


def _tune(
    target: Target,
    rows: Sequence[Sample],
    answers: Sequence[list[int]],
    recipe: Recipe,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] | None,
) -> None:
    model: Any = target.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
    warm = max(1, round(_WARM_UP * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1, (step + 1) / warm))
    mine = rng.permutation(len(rows))[: max(1, round(recipe.share * len(rows)))]
    queue: list[int] = []
    model.train()
    for step in range(recipe.steps):
        while len(queue) < recipe.batch:
            queue += rng.permutation(mine).tolist()
        chosen, queue = queue[: recipe.batch], queue[recipe.batch :]
        loss = answer_loss(target, [rows[i] for i in chosen], [answers[i] for i in chosen])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        if progress:
            progress(step + 1, recipe.steps)
        if recipe.distance and step % _LOOK == _LOOK - 1 and moved(model) >= recipe.distance:
            break
    model.eval()
