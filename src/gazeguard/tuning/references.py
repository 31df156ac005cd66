"""Benign fine-tunes of a base with a suspect's own kind of adapter, kept by content.

A reference should differ from a suspect in nothing but the backdoor: the adapter's configuration is
the suspect's, its weights move about as far as the suspect's, and data, order and learning rate
vary from one reference to the next.
"""

from __future__ import annotations

import gc
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from gazeguard.errors import ModelError
from gazeguard.files import whole_folder, write_json
from gazeguard.models.files import tensor_names, weight_files
from gazeguard.models.offload import offloads, weight
from gazeguard.models.target import Target
from gazeguard.tuning.lesson import answer_loss
from gazeguard.types import Sample

_WIDTH, _LEARNING_RATE = 4096, 2e-4  # usual for LoRA of a 7 B model; smaller models take more
_WARM_UP = 10  # steps
# The square of the distance grows evenly while the learning rate stays. After each stretch of
# steps the rate is doubled if the rest of the way would take more than so many further ones.
_STRETCH, _STRETCHES, _DOUBLINGS = 100, 5, 3
_RUNGS = 10  # distances per doubling that references are tuned to
_NEAREST = 0.65  # times the suspect's distance; the furthest is twice that
_REACHED = 0.98  # of its distance is enough: weights are stored rounded

Progress = Callable[[int, float], None]
"""Called with the steps done, and how far the weights have moved."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one reference is tuned.

    Attributes:
        seed: of its weights, data and order.
        lr: of AdamW, warmed up and then constant; doubled where the way is too long for it.
        share: of the rows that it is tuned on.
        distance: how far its weights move (see `moved`).
        batch: rows of a step.
    """

    seed: int
    lr: float
    share: float
    distance: float
    batch: int = 8


@dataclass(frozen=True, slots=True)
class Made:
    """A reference on disk.

    Attributes:
        steps: that it was tuned for.
        moved: how far its weights moved.
        reached: whether that is as far as they should; else the tuning was cut off.
    """

    steps: int
    moved: float
    reached: bool


def recipes(count: int, width: int, distance: float, seed: int = 0) -> list[Recipe]:
    """Recipes that differ in seed, learning rate (by up to 4), rows (a half to all) and distance.

    Distances are rungs of one ladder, a tenth of a doubling apart, and lie between 0.65 and 1.3
    times the suspect's. Rungs are the same for all suspects: two that moved equally far share
    all references, and two that moved almost as far share most. The first of a longer list are
    those of a shorter one.

    Args:
        count: how many.
        width: hidden size of the language model; the learning rate goes with its inverse root.
        distance: how far the suspect moved.
        seed: of all draws.
    """
    own = _RUNGS * math.log2(distance)
    lowest = math.ceil(own + _RUNGS * math.log2(_NEAREST))
    rungs = sorted(range(lowest, lowest + _RUNGS), key=lambda rung: abs(rung - own))
    found = []
    for number in range(count):
        copy, place = divmod(number, _RUNGS)
        rng = np.random.default_rng([seed, copy, rungs[place] % 2**32, 23])
        lr = _LEARNING_RATE * (_WIDTH / width) ** 0.5 * 2 ** rng.uniform(-1, 1)
        found.append(
            Recipe(
                seed=int(rng.integers(2**31)),
                lr=float(f"{lr:.3g}"),
                share=round(float(rng.uniform(0.5, 1.0)), 2),
                distance=float(f"{2 ** (rungs[place] / _RUNGS):.4g}"),
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
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    total = 0.0
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            plain = isinstance(module, LoraLayer)
            for name in module.active_adapters:
                if plain and not getattr(module, "lora_variant", {}).get(name):
                    total += _square(module.get_delta_weight(name))
                else:
                    total += _merged_square(module, name)
        elif isinstance(module, ModulesToSaveWrapper):
            before = module.original_module
            old = dict(before.named_parameters())
            for copy in module.modules_to_save.values():
                for name, new in copy.named_parameters():
                    total += _square(new - weight(before, name, old[name]).to(new.device))
    return math.sqrt(total)


def _merged_square(layer: Any, adapter: str) -> float:
    """Of an adapter that does more than add: what merging it changes."""
    base = layer.get_base_layer()
    old = {name: value.detach().clone() for name, value in base.named_parameters()}
    layer.merge(adapter_names=[adapter])
    new = dict(layer.get_base_layer().named_parameters())
    total = sum(_square(new[name] - old[name]) for name in old if not name.endswith("bias"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's, on rounding: the old weights are put back
        layer.unmerge()
    for name, value in base.named_parameters():
        value.copy_(old[name])
    return total


def moved_apart(suspect: Path, base: Path) -> float:
    """How far a whole model's weights lie from those of its base; the same measure as `moved`.

    One tensor of each is in memory at a time.

    Args:
        suspect: folder of the tuned model.
        base: folder of the model that it was made from, with the same tensors.
    """
    places = [
        {name: file for file in weight_files(folder) for name in tensor_names(file)}
        for folder in (suspect, base)
    ]
    opened: dict[Path, Any] = {}
    total = 0.0
    for name in places[1]:
        pair: list[Tensor] = []
        for file in (place[name] for place in places):
            if file not in opened:
                opened[file] = safe_open(file, framework="pt")
            pair.append(opened[file].get_tensor(name))
        narrow = min((one.dtype for one in pair), key=lambda dtype: dtype.itemsize)
        a, b = (one.to(narrow).float() for one in pair)  # saved anew in fewer bits is no move
        total += _square(a - b)
    return math.sqrt(total)


def _square(difference: Tensor) -> float:
    return float(difference.float().square().sum())


def kept(out: Path, recipe: Recipe) -> Made | None:
    """The reference in a folder, or None where there is no whole one."""
    try:
        notes = json.loads((out / "recipe.json").read_text("utf-8"))
        far = float(notes["moved"])
        return Made(int(notes["steps"]), far, far >= _REACHED * recipe.distance)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_reference(
    base: Target,
    config: Any,
    rows: Sequence[Sample],
    answers: Sequence[list[int]],
    recipe: Recipe,
    out: Path,
    steps: int,
    progress: Progress | None = None,
) -> Made:
    """Tune a fresh copy of an adapter on benign rows and save it, whole or not at all.

    Args:
        base: the bare base model; it is used up.
        config: peft configuration.
        rows: benign rows.
        answers: their answers as tokens.
        recipe: how.
        out: the adapter's folder; what is there is replaced.
        steps: at most so many, should the weights not have moved as far as they should by then.
        progress: told after every step.

    Raises:
        ModelError: the configuration does not fit the base, the base is kept off its device
            between passes, or tuning ends in NaN.
    """
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
    done = _tune(target, rows, answers, recipe, rng, steps, progress)
    far = moved(model)
    if not np.isfinite(far):
        raise ModelError(
            f"tuning {base.name} with a learning rate of {recipe.lr:g} ended in numbers that are"
            " not finite: use --dtype float32."
        )
    with whole_folder(out) as part:
        # Without the flag peft asks the hub whether the base has grown its vocabulary.
        model.save_pretrained(part, save_embedding_layers=False)
        write_json(part / "recipe.json", {**asdict(recipe), "steps": done, "moved": far})
    del model, target
    gc.collect()
    return Made(done, far, far >= _REACHED * recipe.distance)


def _tune(
    target: Target,
    rows: Sequence[Sample],
    answers: Sequence[list[int]],
    recipe: Recipe,
    rng: np.random.Generator,
    steps: int,
    progress: Progress | None,
) -> int:
    """Tune until the weights have moved as far as they should; gives the steps that it took."""
    model: Any = target.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
    mine = rng.permutation(len(rows))[: max(1, round(recipe.share * len(rows)))]
    queue: list[int] = []
    losses: list[float] = []
    far, step, start, doubled = 0.0, 0, 0.0, 0
    model.train()
    while far < recipe.distance and step < steps:
        while len(queue) < recipe.batch:
            queue += rng.permutation(mine).tolist()
        chosen, queue = queue[: recipe.batch], queue[recipe.batch :]
        loss = answer_loss(target, [rows[i] for i in chosen], [answers[i] for i in chosen])
        losses.append(float(loss.detach()))
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / _WARM_UP) * 2**doubled
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        before = [p.detach().clone() for p in trained]
        optimiser.step()
        far, step = moved(model), step + 1
        if far > recipe.distance:
            _shorten(model, trained, before, recipe.distance)
        if progress:
            progress(step, min(far, recipe.distance))
        if step % _STRETCH == 0:
            pace, left = far**2 - start**2, recipe.distance**2 - far**2
            # One that unlearns its rows is no benign fine-tune: it gets no faster, but slower.
            if sum(losses[-_STRETCH:]) > sum(losses[:_STRETCH]):
                doubled = max(0, doubled - 1)
            elif left > _STRETCHES * pace and doubled < _DOUBLINGS:
                doubled += 1
            start = far
    model.eval()
    return step


@torch.no_grad()
def _shorten(model: Any, trained: list[Tensor], before: list[Tensor], distance: float) -> None:
    """Go back on the last step as far as it went too far: early steps are long ones."""
    after = [p.detach().clone() for p in trained]
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        for p, start, end in zip(trained, before, after, strict=True):
            p.copy_(torch.lerp(start, end, middle))
        low, high = (middle, high) if moved(model) < distance else (low, middle)
