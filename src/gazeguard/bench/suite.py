"""Suites: TOML files that say which models meet which defences.

Top-level keys are the numbers of `Suite`. A `[[models]]` table has the fields of `lab.zoo.Recipe`
(of `lab.text.zoo.EncoderModel` for text encoders), each a value or a list of values that stands for
all combinations, and beside them `base`, `defences`, `refit` and, to take models from a zoo's spec,
`zoo` (a path beside the suite), of which `split` and `truth` choose some. `[[published]]` tables
hold papers' figures. `plugins` names Python files beside the suite that are run first: they add
attacks to `lab.attacks.ATTACKS`, defences with `bench.defences.defence`, models to
`bench.bases.BASES`.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar

from gazeguard.bench.bases import BASES
from gazeguard.bench.defences import DEFENCES
from gazeguard.errors import UsageError
from gazeguard.lab.recipes import combinations
from gazeguard.lab.text.zoo import EncoderModel, read_encoder_spec
from gazeguard.lab.zoo import Recipe, read_spec

SHIPPED = Path(__file__).parent / "suites"
ZOOS = Path(__file__).parent / "zoos"
T = TypeVar("T")
_PUBLISHED = {"defence", "attack", "metric", "value", "where"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of a suite and the defences that it meets.

    Attributes:
        base: name in `bases.BASES`.
        recipe: of the model.
        defences: names in `defences.DEFENCES`.
        refit: whether what a cleaner keeps is fine-tuned on again.
    """

    base: str
    recipe: Recipe | EncoderModel
    defences: tuple[str, ...]
    refit: bool = False

    @property
    def name(self) -> str:
        """The model's, unique in a suite."""
        return f"{self.base}-{self.recipe.name}"


@dataclass(frozen=True)
class Suite:
    """What a suite file asks for.

    Attributes:
        name: the file's.
        title: of its page.
        entries: every model once, in the file's order.
        published: figures of papers, as in the file.
        plugins: Python files that are run before anything else, in every worker too.
        held_out: rows, or prompts, that an attack is judged on.
        asr: an attack with a lower success rate failed.
        drop: an attack that costs more clean performance than this failed.
        calibration: clean requests that input-level defences may look at.
        test: clean requests, and as many triggered ones, that they are measured on.
    """

    name: str
    title: str
    entries: tuple[Entry, ...]
    published: tuple[dict[str, Any], ...] = ()
    plugins: tuple[Path, ...] = ()
    held_out: int = 500
    asr: float = 0.9
    drop: float = 0.03
    calibration: int = 200
    test: int = 300


def shipped() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def read_suite(name: str) -> Suite:
    """Read a suite by the name of a shipped one or the path of a file.

    Raises:
        UsageError: it cannot be read, or asks for what does not exist.
    """
    path = SHIPPED / f"{name}.toml" if name in shipped() else Path(name)
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no suite '{name}': give a TOML file, or one of {', '.join(shipped())}."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no TOML suite ({error}): mend the file.") from error
    tables, published = content.pop("models", []), tuple(content.pop("published", []))
    usual = content.pop("defences", [])
    plugins = tuple(path.parent / name for name in content.pop("plugins", []))
    load_plugins(plugins)
    numbers = {field.name for field in fields(Suite)} - {"name", "entries", "published", "plugins"}
    if unknown := sorted(set(content) - numbers):
        raise UsageError(
            f"{path} has an unknown key '{unknown[0]}': use {', '.join(sorted(numbers))},"
            " defences, [[models]] and [[published]]."
        )
    if odd := [one for one in published if set(one) != _PUBLISHED]:
        raise UsageError(
            f"{path}: a [[published]] table needs {', '.join(sorted(_PUBLISHED))}, not"
            f" {', '.join(sorted(odd[0]))}."
        )
    entries: dict[str, Entry] = {}
    for place, table in enumerate(tables):
        for one in _entries(dict(table), usual, place, path):
            before = entries.get(one.name)
            entries[one.name] = one if before is None else _both(before, one)
    if not entries:
        raise UsageError(f"{path} asks for no model: write at least one [[models]] table.")
    return Suite(
        path.stem,
        content.pop("title", path.stem),
        tuple(entries.values()),
        published,
        plugins,
        **content,
    )


def load_plugins(paths: Sequence[Path]) -> None:
    """Run Python files that register attacks, defences or models; each once in a process.

    Raises:
        UsageError: a file cannot be read.
    """
    for path in paths:
        name = f"gazeguard_plugin_{path.stem}"
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UsageError(f"the suite's plugin {path} is no Python file: mend its path.")
        if name not in sys.modules:
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])


def _entries(table: dict[str, Any], usual: Sequence[str], place: int, path: Path) -> list[Entry]:
    """The models of one table."""
    bases, defences = _listed(table.pop("base", "llava")), table.pop("defences", usual)
    refit, zoo = table.pop("refit", False), table.pop("zoo", None)
    found = []
    for base in bases:
        about = _chosen(BASES, base, "base")
        kind = Recipe if about.kind == "vlm" else EncoderModel
        given = table if about.kind == "vlm" else {"kind": about.family, **table}
        if zoo is not None:
            recipes = _from_zoo(path.parent / zoo, about.kind, table)
        else:
            names = {field.name for field in fields(kind)} | {"take"}
            if unknown := sorted(set(given) - names):
                raise UsageError(
                    f"{path} has an unknown key '{unknown[0]}' in [[models]]: use base, defences,"
                    f" refit, zoo, {', '.join(sorted(names))}."
                )
            recipes = combinations(kind, dict(given), place)
        for name in defences:
            _chosen(DEFENCES, name, "defence")
        found += [Entry(base, recipe, tuple(defences), refit) for recipe in recipes]
    return found


def _from_zoo(path: Path, kind: str, table: dict[str, Any]) -> list[Recipe | EncoderModel]:
    """The models of a zoo's spec, perhaps of one split or one truth alone."""
    recipes: Sequence[Recipe | EncoderModel] = (
        read_spec(path).recipes if kind == "vlm" else read_encoder_spec(path).recipes
    )
    if unknown := sorted(set(table) - {"split", "truth"}):
        raise UsageError(f"beside zoo = '{path.name}' go split and truth, not {unknown[0]}.")
    return [
        recipe
        for recipe in recipes
        if all(getattr(recipe, key) == value for key, value in table.items())
    ]


def _both(one: Entry, other: Entry) -> Entry:
    """The same model in two tables."""
    defences = tuple(dict.fromkeys((*one.defences, *other.defences)))
    return replace(one, defences=defences, refit=one.refit or other.refit)


def _chosen(registry: Mapping[str, T], name: str, what: str) -> T:
    if name not in registry:
        raise UsageError(
            f"the benchmark has no {what} '{name}': choose one of {', '.join(sorted(registry))}."
        )
    return registry[name]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
