"""Versions: what is locked, what is declared, and how an installed one stands to them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from gazeguard import versions
from gazeguard.versions import Needed, untested

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def locked(name: str) -> dict[str, set[str]]:
    """Package -> versions of a lock; several where they depend on Python's."""
    found: dict[str, set[str]] = {}
    for one, version in re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / name).read_text(), re.M):
        found.setdefault(canonicalize_name(one), set()).add(version)
    return found


def declared(*extras: str) -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return [Requirement(line) for line in lines if not line.startswith("gazeguard")]


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("locks/base.txt", ()),
        ("locks/dev.txt", ("bench", "heic", "ray", "server", "test", "dev")),
        ("locks/min.txt", ("bench", "heic", "ray", "server", "test")),
        ("src/gazeguard/tested.txt", ("bench", "heic", "lab", "ray", "server")),
    ],
)
def test_every_lock_holds_what_pyproject_declares(lock, extras):
    found = locked(lock)
    for wanted in declared(*extras):
        if wanted.name == "torch" and lock.startswith("locks/"):
            continue  # pinned in the Makefile: which build fits is the machine's affair
        versions = found.get(canonicalize_name(wanted.name))
        assert versions, f"{lock} lacks {wanted.name}: run `make lock`"
        assert all(wanted.specifier.contains(v) for v in versions), f"{lock}: {wanted}, {versions}"


def test_locks_have_hashes_and_name_no_place_to_fetch_from():
    for lock in ("base", "dev", "min"):
        text = (ROOT / f"locks/{lock}.txt").read_text()
        for block in re.split(r"^(?=[\w.-]+==)", text, flags=re.M):
            assert "==" not in block or "--hash=sha256:" in block, block
        assert not re.search(r"https?://|--(extra-)?index|--find-links|file:|@ ", text)


def test_the_lowest_versions_are_the_declared_ones():
    found = locked("locks/min.txt")
    for wanted in declared("server", "ray", "bench", "heic"):
        (bound,) = (s.version for s in wanted.specifier if s.operator == ">=")
        if wanted.name != "torch":
            (lowest,) = found[canonicalize_name(wanted.name)]
            assert Version(lowest) == Version(bound), f"{wanted.name}: declare >={lowest}"


def test_transformers_ends_before_the_next_minor():
    (wanted,) = (r for r in declared() if r.name == "transformers")
    (highest,) = locked("locks/base.txt")["transformers"]
    major, minor = Version(highest).release[:2]
    assert not wanted.specifier.contains(f"{major}.{minor + 1}.0")


def test_whatever_is_imported_is_declared():
    names = {canonicalize_name(r.name) for r in declared("bench", "heic", "lab", "ray", "server")}
    given = packages_distributions()
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules}:
                if top in sys.stdlib_module_names or top == "gazeguard":
                    continue
                # Some extras of the lab are not installed with the tests.
                packages = {canonicalize_name(p) for p in given.get(top, [top])}
                assert packages & names, f"{file} imports {top}, which pyproject.toml lacks"


@pytest.mark.parametrize(
    ("specifier", "installed", "highest", "standing", "tested"),
    [
        ("<5.25,>=5.23", "5.23.0", "5.24.0", "tested", "5.23 to 5.24.0"),
        ("<5.25,>=5.23", "5.24.0", "5.24.0", "tested", "5.23 to 5.24.0"),
        ("<5.25,>=5.23", "5.24.1", "5.24.0", "newer", "5.23 to 5.24.0"),
        ("<5.25,>=5.23", "5.25.0.dev0", "5.24.0", "newer", "5.23 to 5.24.0"),
        ("<5.25,>=5.23", "5.22.2", "5.24.0", "older", "5.23 to 5.24.0"),
        (">=2.13", "2.13.0+cpu", "2.13.0", "tested", "2.13 to 2.13.0"),
        (">=2.13", None, "2.13.0", "missing", "2.13 to 2.13.0"),
        ("", "1.0", None, "tested", "any"),
    ],
)
def test_standing(specifier, installed, highest, standing, tested):
    one = Needed("name", specifier, None, installed, highest)
    assert one.standing == standing
    assert one.tested == tested


def test_untested_speaks_of_the_named_packages_alone(monkeypatch):
    lines = ["torch>=1", "peft>=99", "numpy>=99", 'ray>=99; extra == "test"']
    monkeypatch.setattr(versions, "requires", lambda _: lines)
    monkeypatch.setattr(versions, "_highest", lambda: {"torch": "1.5", "peft": "100"})
    newer, older = untested("torch", "peft")
    assert re.fullmatch(r"torch 2\S* is newer than the tested 1 to 1.5", newer)
    assert re.fullmatch(r"peft \S+ is older than the tested 99 to 100", older)
    assert untested("torchvision", "ray") == []
