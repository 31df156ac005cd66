"""What all scans of text encoders share: the anchor, the prompts, the references."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gazeguard.data.prompts import built_in, read_prompts
from gazeguard.errors import ModelError, UsageError, WorkerLost
from gazeguard.methods.amdet import References, Settings
from gazeguard.models.encoders.load import load_encoder
from gazeguard.scanning.entry import Progress, entry_of
from gazeguard.scanning.spread import Hands
from gazeguard.scanning.store import Store, digest, folder_hashes
from gazeguard.scanning.target_images import TargetImages
from gazeguard.scanning.text import TextScan

log = logging.getLogger("gazeguard.scan")


def prepare_text(
    anchor: str | Path | None,
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
        UsageError: no anchor, or too few references for `alpha`.
        DataError: the prompts cannot be read, or there are no images to compare with.
        ModelError: the anchor or a reference cannot be used.
    """
    if anchor is None:
        raise UsageError(
            "a text encoder is compared with a clean one: give --anchor, the encoder it was made"
            " from."
        )
    images = None if target_images is None else TargetImages.of(target_images)
    common, words = _common(anchor, prompts, settings, store, dtype, device, hands)
    if references:
        common = replace(common, references=_references(common, references, alpha, progress, hands))
    common = replace(common, textual_inversion=textual_inversion, images=images)
    return common, _provenance(common, str(anchor), words, references, alpha)


def _common(
    anchor: str | Path,
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
