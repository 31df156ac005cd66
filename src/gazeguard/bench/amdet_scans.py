"""What AMDET measures on every encoder of a zoo, kept so that any rule can judge it later."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gazeguard.data.prompts import built_in
from gazeguard.errors import MeasurementError, UsageError
from gazeguard.files import write_bytes
from gazeguard.lab.recipes import read_manifest
from gazeguard.methods.amdet import Settings, scan_encoder
from gazeguard.methods.amdet.decision import leverage_of
from gazeguard.methods.amdet.evidence import Named
from gazeguard.methods.amdet.heldout import HeldOut
from gazeguard.models.encoders.load import load_encoder
from gazeguard.scanning.store import digest, folder_hashes

Entry = dict[str, Any]
DECISION = ("gates", "floor", "threshold", "max_drift")  # settings that no search depends on


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One finished scan.

    Attributes:
        held: the most suspicious embedding on held-out prompts; None when the scan could judge
            nothing.
        positive: share of positive curvatures around it.
        drift: of clean outputs.
        tokens: the vocabulary tokens nearest to it, with cosines.
        seconds: of the scan, loading left out.
    """

    held: HeldOut | None
    positive: float
    drift: float
    tokens: Named
    seconds: float

    def to_bytes(self) -> bytes:
        """As JSON."""
        held = self.held and {
            "assimilation": self.held.assimilation.tolist(),
            "agreement": self.held.agreement.tolist(),
            "anchor": self.held.anchor.tolist(),
            "unity": self.held.unity,
            "target": self.held.target.tolist(),
        }
        rest = {name: getattr(self, name) for name in ("positive", "drift", "tokens", "seconds")}
        return json.dumps({"held": held, **rest}).encode()

    @property
    def leverage(self) -> float:
        """Score beside drift; NaN when nothing could be judged."""
        return float("nan") if self.held is None else leverage_of(self.held.score, self.drift)

    @classmethod
    def from_bytes(cls, data: bytes) -> Seen:
        """The inverse of `to_bytes`."""
        content = json.loads(data)
        held = content["held"]
        if held is not None:
            rows = {k: np.array(held[k]) for k in ("assimilation", "agreement", "anchor")}
            target = np.array(held["target"], dtype=np.float32)
            held = HeldOut(**rows, unity=held["unity"], target=target)
        tokens = [(word, cosine) for word, cosine in content["tokens"]]
        return cls(held, content["positive"], content["drift"], tokens, content["seconds"])


def read_entries(zoo: Path, anchors: Mapping[str, Path]) -> list[Entry]:
    """The entries of a zoo, once it is clear that the anchors are the bases it was made from.

    Raises:
        UsageError: no manifest, or an anchor is missing or another encoder.
    """
    manifest = read_manifest(zoo, "encoder-zoo")
    models: list[Entry] = manifest["models"]
    for kind in sorted({entry["recipe"]["kind"] for entry in models}):
        if kind not in anchors:
            raise UsageError(f"the zoo has {kind} encoders: give --anchor {kind}=FOLDER.")
        if digest(folder_hashes(anchors[kind])) != manifest["bases"][kind]:
            raise UsageError(
                f"{anchors[kind]} is not the {kind} encoder that {zoo} was made from: give the one"
                " that the zoo got as --base."
            )
    return models


def see_all(
    zoo: Path,
    entries: list[Entry],
    anchors: Mapping[str, Path],
    settings: Settings,
    work: Path,
    log: Callable[[str], None],
) -> dict[str, Seen]:
    """Scan every encoder that is not in `work` yet; gives model name -> what was seen.

    A result's file is named by the content of encoder, anchor, prompts and settings of the search:
    any decision can be made from it later.
    """
    found = {}
    for place, entry in enumerate(entries):
        name, kind = entry["model"], entry["recipe"]["kind"]
        found[name], fresh = seen_of(zoo / name, anchors[kind], settings, work)
        if fresh:
            held, seconds = found[name].held, found[name].seconds
            score = "not measurable" if held is None else f"score {held.score:.2f}"
            log(f"{place + 1}/{len(entries)} {name} {kind}: {score}, {seconds:.0f} s")
    return found


def seen_of(model: Path, anchor: Path, settings: Settings, work: Path) -> tuple[Seen, bool]:
    """The scan of an encoder, from `work` where it is there; also whether it is fresh."""
    work.mkdir(parents=True, exist_ok=True)
    prompts = built_in(settings.prompts)
    search = {name: v for name, v in settings.as_dict().items() if name not in DECISION}
    content = [folder_hashes(model), folder_hashes(anchor), [digest(prompts), search]]
    path = work / f"{digest(content)[:32]}.json"
    fresh = not path.is_file()
    if fresh:
        write_bytes(path, _see(model, anchor, prompts, settings).to_bytes())
    return Seen.from_bytes(path.read_bytes()), fresh


def _see(model: Path, anchor: Path, prompts: list[str], settings: Settings) -> Seen:
    suspect, clean = load_encoder(model), load_encoder(anchor)
    began = time.perf_counter()
    try:
        scan = scan_encoder(suspect, clean, prompts, settings)
    except MeasurementError:
        return Seen(None, float("nan"), float("nan"), [], time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return Seen(scan.held, scan.surface.positive, scan.drift, scan.tokens, seconds)
