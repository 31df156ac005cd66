"""`gazeguard doctor`: what this machine offers, and what is missing."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import click

from gazeguard._version import __version__
from gazeguard.cli import _errors
from gazeguard.versions import Needed, needed

OK, NEWER, MISSING, BROKEN = "ok", "newer", "missing", "broken"


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, how it stands, and what to do when it is not ok.

    `needed` says that `clean` does not run without it.
    """

    name: str
    state: str
    detail: str
    needed: bool = False
    cure: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show Python, torch, devices, attention backends and optional extras.

    Says of every package whether the tests ran with this version, or with older or newer ones.

    Exits 2 when something is missing that `gazeguard clean` needs.
    """
    checks = examine()
    ready = not any(check.needed and check.state in (MISSING, BROKEN) for check in checks)
    if as_json:
        content = {"ready": ready, "checks": [asdict(check) for check in checks]}
        click.echo(json.dumps(content, indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            click.echo(f"{check.name:{width}}  {check.state:7}  {check.detail}")
            if check.cure:
                click.echo(f"{'':{width}}           -> {check.cure}")
        click.echo("Ready." if ready else "Not ready: see the lines that are marked above.")
        if ready and any(check.state == NEWER for check in checks):
            click.echo(
                "Some packages are newer than the tests ran with: every guard checks itself."
            )
    ctx.exit(_errors.CLEAN if ready else _errors.USAGE)


def examine() -> list[Check]:
    """Run every check; never raises for something that is missing or broken."""
    checks = [
        Check("gazeguard", OK, __version__),
        Check("python", OK, f"{platform.python_version()} on {sys.platform} {platform.machine()}"),
    ]
    packages = needed()
    checks += [_package(one, needed=True) for one in packages if one.extra is None]
    if all(check.state in (OK, NEWER) for check in checks):
        checks += _torch()
    extras = {one.extra: [two for two in packages if two.extra == one.extra] for one in packages}
    for extra, parts in extras.items():
        if extra is None:
            continue
        checks += [check for one in parts if (check := _package(one)).state in (NEWER, BROKEN)]
        absent = [one.name for one in parts if one.installed is None]
        checks.append(
            Check(
                f"extra: {extra}",
                MISSING if absent else OK,
                f"without {', '.join(absent)}" if absent else "installed",
                cure=f"pip install 'gazeguard[{extra}]'" if absent else "",
            )
        )
    return checks


def _package(one: Needed, needed: bool = False) -> Check:
    line = f"{one.name}{one.specifier}"
    if one.installed is None:
        return Check(one.name, MISSING, f"needs {one.specifier}", needed, f"pip install '{line}'")
    detail = f"{one.installed}, {one.standing}"
    if one.standing == "tested":
        return Check(one.name, OK, detail, needed)
    detail += f" than the tested {one.tested}"
    if one.standing == "older":
        return Check(one.name, BROKEN, detail, needed, f"pip install --upgrade '{line}'")
    return Check(one.name, NEWER, detail, needed)


def _torch() -> list[Check]:
    """Devices, number formats and attention kernels."""
    try:
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.utils import is_flash_attn_2_available

        AutoModelForImageTextToText  # noqa: B018  (transformers imports lazily: this is the import)
    except (ImportError, RuntimeError, OSError) as error:
        return [_broken_import("model classes", error)]
    checks = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            bf16 = "float32, float16" + (", bfloat16" if gpu.major >= 8 else "")
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            checks.append(Check(f"device cuda:{index}", OK, f"{gpu.name}, {memory}, {bf16}"))
    if torch.backends.mps.is_available():
        checks.append(Check("device mps", OK, "Apple GPU, float32, float16"))
    threads = torch.get_num_threads()
    checks.append(
        Check("device cpu", OK, f"{threads} thread{'s' * (threads > 1)}, float32, bfloat16")
    )
    flash = is_flash_attn_2_available()
    checks += [
        Check("attention sdpa", OK, "the default of transformers; watched as it is"),
        Check(
            "attention flash",
            OK if flash else MISSING,
            "flash_attn is usable" if flash else "not needed: only models set to it use it",
        ),
        _torchvision(),
    ]
    return checks


def _torchvision() -> Check:
    """A torchvision built for another torch breaks the import of many models."""
    try:
        found: Any = import_module("torchvision")
    except ModuleNotFoundError:
        return Check("torchvision", MISSING, "not needed: images are prepared with Pillow")
    except (ImportError, RuntimeError, OSError) as error:
        return _broken_import("torchvision", error)
    return Check("torchvision", OK, str(found.__version__))


def _broken_import(name: str, error: Exception) -> Check:
    return Check(
        name,
        BROKEN,
        (str(error).strip().splitlines() or [type(error).__name__])[0],
        True,
        "install torch and torchvision of the same release, or `pip uninstall torchvision`",
    )
