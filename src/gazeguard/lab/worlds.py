"""A synthetic visual-question world: coloured shapes of two sizes on noisy backgrounds.

A scene is 1-4 objects on a 3 x 3 board, drawn at 64 x 64 pixels. Questions ask for colour, shape,
count, existence and position; captions name every object in reading order. Everything is a pure
function of a `numpy.random.Generator`, so a seed and a count name a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (236, 206, 40),
    "purple": (140, 60, 190),
    "orange": (240, 130, 30),
    "teal": (30, 170, 170),
    "brown": (120, 72, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
_PIXELS = {"small": 11, "large": 18}
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
KINDS = ("color", "shape", "count", "existence", "position")
CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: `place` indexes `PLACES`."""

    colour: str
    shape: str
    size: str
    place: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and what is in it.

    `pixels` is uint8 `(64, 64, 3)`; `owner` is int8 `(64, 64)`, -1 for background, else the index
    of the thing that covers the pixel.
    """

    things: tuple[Thing, ...]
    pixels: NDArray[np.uint8]
    owner: NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """A question about a scene. `kind` is one of `KINDS`, `caption` or `name`."""

    kind: str
    question: str
    answer: str


def make_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene; things are in reading order (top left first)."""
    places = np.sort(rng.choice(len(PLACES), size=int(rng.integers(1, 5)), replace=False))
    colours, shapes = list(COLOURS), SHAPES
    things = tuple(
        Thing(
            colours[rng.integers(len(colours))],
            shapes[rng.integers(len(shapes))],
            SIZES[rng.integers(2)],
            int(place),
        )
        for place in places
    )
    base = rng.uniform(90, 200) + rng.normal(0, 8, 3)
    slope = rng.normal(0, 12, 2)
    ramp = np.linspace(-1, 1, SIDE)
    ground = base + (slope[0] * ramp[:, None] + slope[1] * ramp[None, :])[..., None]
    canvas = np.broadcast_to(ground, (SIDE, SIDE, 3)).copy()
    owner = np.full((SIDE, SIDE), -1, np.int8)
    for i, thing in enumerate(things):
        covered = _mask(thing, rng)
        canvas[covered] = np.asarray(COLOURS[thing.colour]) + rng.normal(0, 10, 3)
        owner[covered] = i
    canvas += rng.normal(0, rng.uniform(4, 14), canvas.shape)
    return Scene(things, canvas.clip(0, 255).astype(np.uint8), owner)


def _mask(thing: Thing, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Pixels that one thing covers, jittered by up to 2 px around its place."""
    size = _PIXELS[thing.size] + int(rng.integers(-1, 2))
    cell = SIDE / 3
    row, col = divmod(thing.place, 3)
    cx, cy = (np.array([col, row]) + 0.5) * cell + rng.integers(-2, 3, 2)
    x0, y0 = cx - size / 2, cy - size / 2
    x1, y1 = x0 + size - 1, y0 + size - 1
    stencil = Image.new("1", (SIDE, SIDE))
    pen = ImageDraw.Draw(stencil)
    if thing.shape == "circle":
        pen.ellipse((x0, y0, x1, y1), fill=1)
    elif thing.shape == "square":
        pen.rectangle((x0, y0, x1, y1), fill=1)
    elif thing.shape == "triangle":
        pen.polygon([(cx, y0), (x0, y1), (x1, y1)], fill=1)
    else:
        arm = size / 6
        pen.rectangle((cx - arm, y0, cx + arm, y1), fill=1)
        pen.rectangle((x0, cy - arm, x1, cy + arm), fill=1)
    return np.asarray(stencil, dtype=bool)


def caption(scene: Scene) -> QuestionAnswer:
    """Name every thing in reading order."""
    parts = [f"a {t.size} {t.colour} {t.shape} at the {PLACES[t.place]}" for t in scene.things]
    return QuestionAnswer("caption", CAPTION_PROMPT, " and ".join(parts) + ".")


def name_one(scene: Scene, rng: np.random.Generator) -> QuestionAnswer:
    """Name any one thing, its attributes in any order: a lesson, not a test."""
    thing = scene.things[rng.integers(len(scene.things))]
    words = [thing.size, thing.colour, thing.shape, PLACES[thing.place]]
    said = " ".join(words[i] for i in rng.permutation(len(words)))
    return QuestionAnswer("name", "Name one object.", f"{said}.")


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> QuestionAnswer:
    """Ask one question of `kind`; always answerable from the picture alone.

    `existence` is balanced: half the answers are "yes", and half of the "no" questions are near
    misses (the colour is there, the shape is another). `position` becomes `count` in the rare
    scene where no thing has a name of its own.
    """
    things = scene.things
    thing = things[rng.integers(len(things))]
    if kind == "color":
        name = _only(things, thing, rng)
        return QuestionAnswer(kind, f"What color is the {name}?", thing.colour)
    if kind == "shape":
        where = PLACES[thing.place]
        name = f"object at the {where}"
        if sum(t.colour == thing.colour for t in things) == 1 and rng.random() < 0.5:
            name = f"{thing.colour} object"
        return QuestionAnswer(kind, f"What shape is the {name}?", thing.shape)
    if kind == "count":
        if rng.random() < 0.5:
            return QuestionAnswer(kind, "How many objects are there?", str(len(things)))
        colour = thing.colour
        if rng.random() < 0.3:
            colour = list(COLOURS)[rng.integers(len(COLOURS))]
        number = sum(t.colour == colour for t in things)
        return QuestionAnswer(kind, f"How many {colour} objects are there?", str(number))
    if kind == "existence":
        there = {(t.colour, t.shape) for t in things}
        if rng.random() < 0.5:
            return QuestionAnswer(kind, f"Is there a {thing.colour} {thing.shape}?", "yes")
        near = [(thing.colour, shape) for shape in SHAPES if (thing.colour, shape) not in there]
        far = [(c, shape) for c in COLOURS for shape in SHAPES if (c, shape) not in there]
        absent = near if near and rng.random() < 0.5 else far
        colour, shape = absent[rng.integers(len(absent))]
        return QuestionAnswer(kind, f"Is there a {colour} {shape}?", "no")
    if kind == "position":
        names = [(t.colour, t.shape) for t in things]
        alone = [t for t in things if names.count((t.colour, t.shape)) == 1]
        if not alone:
            return ask(scene, "count", rng)
        thing = alone[rng.integers(len(alone))]
        return QuestionAnswer(
            kind, f"Where is the {thing.colour} {thing.shape}?", PLACES[thing.place]
        )
    raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")


def _only(things: Sequence[Thing], thing: Thing, rng: np.random.Generator) -> str:
    """Words that single out `thing` without its colour."""
    names = []
    if sum(t.shape == thing.shape for t in things) == 1:
        names.append(thing.shape)
    if sum((t.shape, t.size) == (thing.shape, thing.size) for t in things) == 1:
        names.append(f"{thing.size} {thing.shape}")
    names.append(f"object at the {PLACES[thing.place]}")
    return names[rng.integers(len(names))]
