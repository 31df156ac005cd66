"""The base's first stage: a vision tower that says what is where, and what every patch looks like.

Labels are dense: for each image token the colour, shape and size of what is there, and its pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gazeguard.lab import worlds
from gazeguard.lab.architectures import Architecture
from gazeguard.lab.architectures.protocol import GRID, MEAN, PATCH, STD, channels
from gazeguard.lab.base_recipe import BaseRecipe
from gazeguard.lab.precision import autocast
from gazeguard.lab.teach import Log, steps, update

_CHUNK = 512  # pictures of a look


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 `(n, 64, 64, 3)` to the tower's float input `(n, 3, 64, 64)`."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).sub_(MEAN).div_(STD)


def train_tower(
    model: Any,
    architecture: Architecture,
    scenes: list[worlds.Scene],
    real: NDArray[np.uint8],
    recipe: BaseRecipe,
    rng: np.random.Generator,
    log: Log,
    kept: Path,
) -> None:
    """Teach the tower and freeze it; a tower that an earlier, cut run left in `kept` is taken."""
    tower = model.model.vision_tower
    if kept.is_file():
        tower.load_state_dict(load_file(kept))
        tower.requires_grad_(False).eval()
        log(f"took the tower of {kept}")
        return
    size = channels(model)
    outs = (len(worlds.COLOURS) + 1, len(worlds.SHAPES) + 1, len(worlds.SIZES) + 1)
    heads = nn.ModuleList([nn.Linear(size, n) for n in outs])
    pixels_head = nn.Linear(size, 3 * PATCH * PATCH)
    labels = torch.from_numpy(np.stack([_patch_labels(s) for s in scenes]))
    pixels = np.stack([s.pixels for s in scenes])
    trained = [*tower.parameters(), *heads.parameters(), *pixels_head.parameters()]
    tower.train()
    real_share = recipe.tower_batch // 8
    for step, optimiser in steps(trained, recipe.tower_lr, recipe.tower_steps):
        pick = rng.integers(len(scenes), size=recipe.tower_batch - real_share)
        extra = rng.integers(len(real), size=real_share)
        images = normalise(np.concatenate([_clutter(pixels[pick], rng), real[extra]]))
        with autocast():
            features = architecture.look(model, images)
            seen = features[: len(pick)]
            logits = [head(seen) for head in heads]
            painted = pixels_head(features)
        loss = sum(
            F.cross_entropy(out.float().flatten(0, 1), labels[pick, k].flatten())
            for k, out in enumerate(logits)
        )
        tiles = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        loss = loss + F.mse_loss(painted.float(), tiles)
        update(optimiser, loss, trained)
        if step % 100 == 0:
            hit = [
                (out.argmax(-1) == labels[pick, k])[labels[pick, 0] > 0].float().mean().item()
                for k, out in enumerate(logits)
            ]
            log(f"tower {step} loss {loss.item():.3f} patch accuracy {np.round(hit, 3)}")
    tower.requires_grad_(False).eval()
    save_file(tower.state_dict(), kept)


def look_all(
    model: Any,
    architecture: Architecture,
    scenes: list[worlds.Scene],
    real: NDArray[np.uint8],
    rng: np.random.Generator,
) -> Tensor:
    """The frozen tower's features of every picture, `(scenes + real, tokens, channels)` float16."""
    bank = torch.empty(len(scenes) + len(real), GRID * GRID, channels(model), dtype=torch.float16)
    with torch.inference_mode(), autocast():
        for start in range(0, len(scenes), _CHUNK):
            pixels = _clutter(np.stack([s.pixels for s in scenes[start : start + _CHUNK]]), rng)
            bank[start : start + len(pixels)] = architecture.look(model, normalise(pixels))
        for start in range(0, len(real), _CHUNK):
            pixels = real[start : start + _CHUNK]
            place = len(scenes) + start
            bank[place : place + len(pixels)] = architecture.look(model, normalise(pixels))
    return bank


def patch_things(scene: worlds.Scene) -> NDArray[np.int64]:
    """`(64,)`: index of the thing that covers at least 1/4 of each patch, -1 where none does."""
    blocks = scene.owner.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3)
    tiles = blocks.reshape(GRID * GRID, PATCH * PATCH)
    share = np.stack([(tiles == i).mean(1) for i in range(len(scene.things))])
    return np.where(share.max(0) >= 0.25, share.argmax(0), -1)


def _patch_labels(scene: worlds.Scene) -> NDArray[np.int64]:
    """`(3, 64)`: colour, shape, size + 1 of the thing on each patch, 0 for none."""
    labels = np.zeros((3, GRID * GRID), np.int64)
    things = patch_things(scene)
    for patch in np.flatnonzero(things >= 0):
        thing = scene.things[things[patch]]
        labels[:, patch] = (
            1 + list(worlds.COLOURS).index(thing.colour),
            1 + worlds.SHAPES.index(thing.shape),
            1 + worlds.SIZES.index(thing.size),
        )
    return labels


def _clutter(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Paste 1-3 small rectangles of flat colour, noise or stripes into a third of the images."""
    pixels = pixels.copy()
    for i in np.flatnonzero(rng.random(len(pixels)) < 0.33):
        for _ in range(rng.integers(1, 4)):
            h, w = rng.integers(3, 10, 2)
            y, x = rng.integers(0, worlds.SIDE - h), rng.integers(0, worlds.SIDE - w)
            fill = np.broadcast_to(rng.integers(0, 256, 3), (h, w, 3)).copy()
            style = rng.integers(3)
            if style == 1:
                fill = rng.integers(0, 256, (h, w, 3))
            elif style == 2:
                stripe = (
                    np.arange(h)[:, None] // 2 + np.arange(w)[None] // 2 * rng.integers(2)
                ) % 2
                fill[stripe.astype(bool)] = rng.integers(0, 256, 3)
            pixels[i, y : y + h, x : x + w] = fill
    return pixels
