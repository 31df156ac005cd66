"""What all scans of text encoders share: the anchor, the prompts, the references."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gazeguard.data.prompts import built_in, read_prompts
from gazeguard.errors import ModelError, UsageError, WorkerLost
from gazeguard.methods.amdet import References, Settings
from gazeguard.models.encoders.load import (
    encoder_folder,
    encoders_of,
    load_encoder,
    place_in_pipeline,
    unreadable,
)
from gazeguard.models.unread import Unread
from gazeguard.scanning.entry import Progress, entry_of
from gazeguard.scanning.models import TEXT_ENCODER
from gazeguard.scanning.result import ScannedModel, Status
from gazeguard.scanning.spread import Hands
from gazeguard.scanning.store import Store, digest, folder_hashes
from gazeguard.scanning.target_images import TargetImages
from gazeguard.scanning.text import TextScan
from gazeguard.types import Outcome, Verdict

log = logging.getLogger("gazeguard.scan")

_FIRST = "text_encoder"  # of a pipeline, and what an encoder alone is compared as


@dataclass(frozen=True, slots=True)
class Pair:
    """What an encoder is compared with.

    Attributes:
        anchor: a clean encoder.
        place: name of the encoder in a pipeline.
    """

    anchor: str
    place: str = _FIRST

    def among(self, references: Sequence[str]) -> list[str]:
        """Those that are fine-tunes of the same encoder; one alone is taken for such."""
        places = [place_in_pipeline(encoder_folder(name)) for name in references]
        return [n for n, p in zip(references, places, strict=True) if p in ("", self.place)]


def pairs(names: Sequence[str], anchor: str | None) -> dict[str, Pair | ScannedModel]:
    """For every encoder what it is compared with, or the entry of one that is not scanned.

    An anchor that is a pipeline has an anchor for every encoder of a pipeline. One alone is that of
    the first.

    Raises:
        UsageError: no anchor.
        ModelError: there is no such anchor.
    """
    if anchor is None:
        raise UsageError(
            "a text encoder is compared with a clean one: give --anchor, the encoder it was made"
            " from."
        )
    clean = encoders_of(anchor)
    found: dict[str, Pair | ScannedModel] = {}
    begun: set[str] = set()
    for name in names:
        folder = encoder_folder(name)
        place = place_in_pipeline(folder)
        pipeline = str(folder.parent) if place else ""
        mine = anchor if clean == [anchor] else f"{anchor.rstrip('/')}/{place or _FIRST}"
        if place and (why := unreadable(folder, name)):
            found[name] = _left_out(name, place, why)
        elif mine == anchor and pipeline in begun:
            why = "give as --anchor the pipeline that it was made from, which has one for each"
            found[name] = _left_out(name, place, f"{anchor} is the first encoder's anchor: {why}")
        elif mine != anchor and mine not in clean:
            found[name] = _left_out(name, place, f"the anchor {anchor} has no {place or _FIRST}")
        else:
            found[name] = Pair(mine, place or _FIRST)
            begun |= {pipeline} - {""}
    return found


def _left_out(name: str, place: str, why: str) -> ScannedModel:
    verdict = Verdict(Outcome.INCONCLUSIVE, None, None, "", f"Not scanned: {why}.")
    left_out = (Unread(place or _FIRST, why),)
    return ScannedModel(name, Status.DONE, TEXT_ENCODER, "amdet", verdict, not_scanned=left_out)


def prepare_text(
    anchor: str,
    prompts: str | Path | Sequence[str] | None,
    references: Sequence[str],
    alpha: float,
    settings: Settings,
    store: Store,
    textual_inversion: bool,
    target_images: str | Path | None,
    dtype: str,
    device: str,
    progress: Progress | None,
    hands: Hands,
) -> tuple[TextScan, dict[str, Any]]:
    """Load what all encoders are compared with; gives the scanner and its provenance.

    Raises:
        UsageError: too few references for `alpha`.
        DataError: the prompts cannot be read, or there are no images to compare with.
        ModelError: the anchor or a reference cannot be used.
    """
    images = None if target_images is None else TargetImages.of(target_images)
    common, words = _common(anchor, prompts, settings, store, dtype, device, hands)
    if references:
        common = replace(common, references=_references(common, references, alpha, progress, hands))
    common = replace(common, textual_inversion=textual_inversion, images=images)
    return common, _provenance(common, anchor, words, references, alpha)


def _common(
    anchor: str,
    prompts: str | Path | Sequence[str] | None,
    settings: Settings,
    store: Store,
    dtype: str,
    device: str,
    hands: Hands,
) -> tuple[TextScan, str]:
    """Load what all scans share, and say where the prompts are from."""
    if prompts is None:
        words, source = built_in(settings.prompts), "built in"
    elif isinstance(prompts, str | Path):
        words, source = read_prompts(prompts), str(prompts)
    else:
        words, source = list(prompts), "given"
    place = hands.call(_place, device)
    # An optimisation goes through the encoder, so half precision is only for who asks for it.
    number = "float32" if dtype == "auto" else dtype
    clean = load_encoder(anchor, dtype=number, device=place if hands.here else "cpu")
    clean.check_finite()
    return TextScan(clean, words, settings, clean.dtype, place, store), source


def _place(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device '{device}' cannot be used here: give cpu or cuda.") from error
    return place


def _references(
    common: TextScan,
    names: Sequence[str],
    alpha: float,
    progress: Progress | None,
    hands: Hands,
) -> References:
    """Scan the benign fine-tunes; asks first whether there are enough of them."""
    References((0.0,) * len(names), alpha)  # raises before hours of work
    leverages = [0.0] * len(names)
    scan_one = partial(entry_of, common.scan, progress=progress)
    for done, (place, entry) in enumerate(hands.each(scan_one, names), 1):
        name = names[place]
        if isinstance(entry, WorkerLost):
            raise ModelError(f"the reference {name} could not be measured: {entry}")
        if entry.error:
            raise ModelError(entry.error)
        if "leverage" not in entry.numbers:
            raise ModelError(f"the reference {name} could not be measured: {entry.reason}")
        log.info(
            "reference %d of %d: %s: leverage %.2f",
            done,
            len(names),
            name,
            entry.numbers["leverage"],
        )
        leverages[place] = float(entry.numbers["leverage"])
    return References(tuple(leverages), alpha)


def _provenance(
    common: TextScan, anchor: str, words: str, references: Sequence[str], alpha: float
) -> dict[str, Any]:
    folder = common.anchor.folder
    return {
        "anchor": {
            "model": anchor,
            "fingerprint": "" if folder is None else digest(folder_hashes(folder)),
        },
        "prompts": {
            "source": words,
            "count": len(common.prompts),
            "fingerprint": digest(list(common.prompts)),
        },
        "target_images": None
        if common.images is None
        else {"source": str(common.images.root.folder), "count": len(common.images.files)},
        "references": list(references),
        "alpha": alpha if references else None,
        "settings": common.settings.as_dict(),
        "seed": common.settings.seed,
        "dtype": str(common.dtype).removeprefix("torch."),
        "device": str(common.device),
    }
