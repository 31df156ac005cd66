"""A guard on disk: `guard.safetensors` for the numbers, `guard.json` for what they mean."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from gazeguard._version import __version__
from gazeguard.errors import UsageError
from gazeguard.files import write_bytes, write_json
from gazeguard.guarding.prompts import Prompts
from gazeguard.methods.cleansight.settings import Plan, Setting

FORMAT = 1
_JSON, _TENSORS = "guard.json", "guard.safetensors"
_NAMES = frozenset({"mean", "whitener", "calibration", "levels"})
_MAY = frozenset({"divergence"})


@dataclass(frozen=True, slots=True)
class Saved:
    """All that makes a guard, apart from the model.

    Attributes:
        setting: what is looked at and hidden.
        plan: the same in layer numbers.
        arrays: float64 `mean (D,)`, `whitener (D,)` or `(D, D)`, `calibration (n,)`, `levels
            (layer, head)`; with the witness `base` also `divergence (m,)`, ascending, nats.
        alpha: the promised false-alarm rate.
        seed: of the split in halves.
        counts: clean samples by use.
        fingerprint: of the model.
        created: when, in UTC.
        spread: lowest and highest threshold over splits of the same samples; None, like `prompts`,
            in guards made before it was kept.
        prompts: of the calibration.
    """

    setting: Setting
    plan: Plan
    arrays: dict[str, NDArray[np.float64]]
    alpha: float
    seed: int
    counts: dict[str, int]
    fingerprint: dict[str, Any]
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    spread: tuple[float, float] | None = None
    prompts: Prompts | None = None


def write(saved: Saved, folder: Path) -> Path:
    """Write both files, the JSON last; raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in saved.arrays.items()}
    )
    content = {
        "format": FORMAT,
        "method": "cleansight",
        "gazeguard": __version__,
        "created": saved.created,
        "setting": asdict(saved.setting),
        "plan": asdict(saved.plan),
        "alpha": saved.alpha,
        "seed": saved.seed,
        "samples": saved.counts,
        "threshold_spread": saved.spread,
        "prompts": saved.prompts and saved.prompts.as_json(),
        "tensors": {"file": _TENSORS, "sha256": hashlib.sha256(tensors).hexdigest()},
        "model": saved.fingerprint,
    }
    write_bytes(folder / _TENSORS, tensors)
    write_json(folder / _JSON, content)
    return folder


def read(folder: Path) -> Saved:
    """Read what `write` wrote.

    Raises:
        UsageError: no guard there, damaged files, or a format of another version.
    """
    path = folder / _JSON
    try:
        content = json.loads(path.read_text("utf-8"))
        tensors = (folder / _TENSORS).read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no guard in {folder} ({Path(error.filename).name} is missing): make one with"
            " `gazeguard calibrate`."
        ) from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read: calibrate again.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UsageError(
            f"{path} has format {found}, and this gazeguard {__version__} reads format {FORMAT}:"
            " calibrate again."
        )
    try:
        if hashlib.sha256(tensors).hexdigest() != content["tensors"]["sha256"]:
            raise ValueError("the tensors are not the ones that were written")
        arrays = safetensors.numpy.load(tensors)
        if set(arrays) - _MAY != _NAMES:
            raise ValueError("other tensors than a guard has")
        setting, plan = content["setting"], content["plan"]
        spread, prompts = content.get("threshold_spread"), content.get("prompts")
        return Saved(
            Setting(**{**setting, "layers": _layers(setting["layers"])}),
            Plan(tuple(plan["layers"]), tuple(plan["pick"]), plan["hide_from"]),
            arrays,
            content["alpha"],
            content["seed"],
            content["samples"],
            content["model"],
            content["created"],
            spread and (float(spread[0]), float(spread[1])),
            prompts and Prompts.of(prompts),
        )
    except (ValueError, KeyError, IndexError, TypeError, SafetensorError) as error:
        raise UsageError(f"the guard in {folder} is damaged ({error}): calibrate again.") from error


def _layers(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
