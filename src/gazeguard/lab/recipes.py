"""Specs of zoos: TOML tables of recipes, whose lists stand for combinations."""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from gazeguard.errors import UsageError

SPLITS = ("design", "held-out")
MANIFEST = "manifest.json"


class Named(Protocol):
    """A dataclass that says what one model of a zoo is made of."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """The model's folder, from everything that decides what the model is."""
        ...


Recipe = TypeVar("Recipe", bound=Named)


def content_name(content: Mapping[str, Any]) -> str:
    """A folder's name that tells nothing: 12 hex digits of a hash."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def need_known(recipe: Named, known: Mapping[str, Collection[str]]) -> None:
    """Check a recipe's fields that have named choices.

    Raises:
        UsageError: one has another value.
    """
    for name, choices in known.items():
        if getattr(recipe, name) not in choices:
            raise UsageError(
                f"the zoo's {name} '{getattr(recipe, name)}' is unknown: choose one of"
                f" {', '.join(choices)}."
            )


def read_manifest(zoo: Path, verb: str) -> dict[str, Any]:
    """What a zoo's models really are.

    Args:
        zoo: its folder.
        verb: of `gazeguard lab`, that makes such zoos.

    Raises:
        UsageError: there is no manifest.
    """
    try:
        return dict(json.loads((zoo / MANIFEST).read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{zoo} has no {MANIFEST}: make the zoo with `gazeguard lab {verb}`."
        ) from error


def read_recipes(
    path: Path, recipe: type[Recipe], numbers: Collection[str]
) -> tuple[tuple[Recipe, ...], dict[str, Any]]:
    """Read a spec: top-level `numbers`, and `[[models]]` tables of a recipe's fields.

    Every value of a table may be a list; the table then stands for all combinations, or, with
    `take = n`, for n of them in which every value appears about equally often.

    Returns:
        Every model once, in the file's order, and the numbers that the file sets.

    Raises:
        UsageError: it cannot be read, or asks for what does not exist.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no TOML spec of a zoo ({error}): mend the file.") from error
    tables = content.pop("models", [])
    names = {field.name for field in fields(recipe)} | {"take"}
    unknown = sorted(set(content) - set(numbers)) + sorted(
        key for table in tables for key in table if key not in names
    )
    if unknown:
        raise UsageError(
            f"{path} has an unknown key '{unknown[0]}': use {', '.join(sorted(numbers))} and, in"
            f" [[models]], {', '.join(sorted(names))}."
        )
    found: dict[str, Recipe] = {}
    for place, table in enumerate(tables):
        for one in combinations(recipe, dict(table), place):
            found.setdefault(one.name, one)
    if not found:
        raise UsageError(f"{path} asks for no model: write at least one [[models]] table.")
    return tuple(found.values()), content


def combinations(recipe: type[Recipe], table: dict[str, Any], seed: int) -> list[Recipe]:
    """The recipes that a table stands for; `seed` draws those of a `take`."""
    take = table.pop("take", None)
    choices = [value if isinstance(value, list) else [value] for value in table.values()]
    try:
        product = [
            recipe(**dict(zip(table, one, strict=True))) for one in itertools.product(*choices)
        ]
    except TypeError as error:
        raise UsageError(f"a value in [[models]] has the wrong type ({error}).") from error
    if take is None:
        return product
    if not 0 < take <= len(product):
        raise UsageError(f"take = {take} of {len(product)} combinations: choose fewer.")
    left = [product[i] for i in np.random.default_rng([seed, 31]).permutation(len(product))]
    used: dict[tuple[str, Any], int] = {}
    chosen: list[Recipe] = []
    while len(chosen) < take:
        best = min(left, key=lambda r: sum(used.get((k, getattr(r, k)), 0) ** 2 for k in table))
        left.remove(best)
        chosen.append(best)
        for key in table:
            used[key, getattr(best, key)] = used.get((key, getattr(best, key)), 0) + 1
    return chosen
