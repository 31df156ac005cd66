"""Which versions of other packages this gazeguard was tested with.

The lowest is the bound in pyproject.toml (`make test-min` runs it), the highest the locked one
(`make test`), kept in `tested.txt` by `make lock`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

Standing = Literal["tested", "older", "newer", "missing"]


@dataclass(frozen=True, slots=True)
class Needed:
    """A package that gazeguard, or one of its extras, imports.

    Attributes:
        name: on the package index.
        specifier: the bounds of pyproject.toml, e.g. `<5.25,>=5.23`.
        extra: the extra it belongs to; None for what is always needed.
        installed: its version here; None where it is missing.
        highest: the highest version the tests have run with; None for an unlocked package.
    """

    name: str
    specifier: str
    extra: str | None
    installed: str | None
    highest: str | None

    @property
    def standing(self) -> Standing:
        """Where the installed version stands to the tested ones."""
        if self.installed is None:
            return "missing"
        here = Version(self.installed)
        bounds = [Version(part[2:]) for part in self.specifier.split(",") if part[:2] == ">="]
        if any(here < bound for bound in bounds):
            return "older"
        # A local version (2.13.0+cpu) is a build of the same release.
        newer = self.highest is not None and Version(here.public) > Version(self.highest)
        return "newer" if newer else "tested"

    @property
    def tested(self) -> str:
        """The tested versions, in words."""
        lowest = next((part[2:] for part in self.specifier.split(",") if part[:2] == ">="), "any")
        return lowest if self.highest in (None, lowest) else f"{lowest} to {self.highest}"


def needed(*names: str) -> list[Needed]:
    """Packages that are needed, always or for an extra that users install; all without a name."""
    wanted = [
        (line, Requirement(line).name)
        for line in requires("gazeguard") or ()
        if _extra(line) not in _OURS
    ]
    return [_needed(line) for line, name in wanted if name in names or not names]


def untested(*names: str) -> list[str]:
    """A sentence for each of these packages whose version has not been tested."""
    return [
        f"{one.name} {one.installed} is {one.standing} than the tested {one.tested}"
        for one in needed(*names)
        if one.standing in ("older", "newer")
    ]


_OURS = ("test", "dev")


def _needed(line: str) -> Needed:
    wanted = Requirement(line)
    try:
        installed = version(wanted.name)
    except PackageNotFoundError:
        installed = None
    name = canonicalize_name(wanted.name)
    return Needed(name, str(wanted.specifier), _extra(line), installed, _highest().get(name))


def _extra(line: str) -> str | None:
    _, found, extra = line.partition("extra ==")
    return extra.strip(" '\")") if found else None


@cache
def _highest() -> dict[str, str]:
    lines = files("gazeguard").joinpath("tested.txt").read_text("utf-8").split()
    return dict(line.split("==") for line in lines if "==" in line)
