"""Scanning a list of models, one after the other, so that a killed run can go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gazeguard.data.prompts import built_in, read_prompts
from gazeguard.errors import GazeguardError, MeasurementError, ModelError, UsageError
from gazeguard.methods.amdet import References, Settings
from gazeguard.models.encoders.load import load_encoder
from gazeguard.provenance import environment
from gazeguard.scanning.models import expand, kind_of
from gazeguard.scanning.result import ScannedModel, ScanReport, Status
from gazeguard.scanning.store import Store, digest, folder_hashes
from gazeguard.scanning.text import TextScan

log = logging.getLogger("gazeguard.scan")

Watch = Callable[[ScanReport], None]
Progress = Callable[[str, int, int], None]


def scan(
    models: Sequence[str | Path] | str | Path,
    anchor: str | Path | None = None,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    references: Sequence[str | Path] = (),
    alpha: float = 0.05,
    settings: Settings | None = None,
    out: str | Path | None = None,
    textual_inversion: bool = False,
    dtype: str = "float32",
    device: str = "auto",
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> ScanReport:
    """Say for each model whether somebody planted a backdoor in it.

    A model that cannot be used is an entry of its own and does not stop the others.

    Args:
        models: text encoders: hub ids, folders, globs, files with one model a line.
        anchor: the clean encoder that they were made from.
        prompts: a file, or a list; the built-in ones when None.
        references: benign fine-tunes of the anchor; the threshold is then calibrated on them
            instead of taken from the paper.
        alpha: share of benign encoders that may be flagged, with references.
        settings: of AMDET.
        out: a folder for results and recovered embeddings; a run in the same folder takes finished
            results from there.
        textual_inversion: also write a file that diffusers loads.
        dtype: float32, or bfloat16 to save time on a GPU.
        device: where to run; auto takes a GPU when there is one.
        watch: called with the report before the first model and after each.
        progress: called with the model, steps done and steps in all.

    Raises:
        UsageError: no anchor, too few references for `alpha`, an unusable output folder.
        DataError: the prompts cannot be read.
        ModelError: the anchor or a reference cannot be used.
    """
    named = expand([str(models)] if isinstance(models, str | Path) else [str(m) for m in models])
    settings = settings or Settings()
    report = ScanReport(tuple(ScannedModel(name) for name in named), False, {})
    if watch is not None:
        watch(report)
    kinds = [_kind(name) for name in named]
    for place, (name, kind) in enumerate(zip(named, kinds, strict=True)):
        if isinstance(kind, ModelError):
            report = report.updated(place, _failed(name, kind))
    if report.finished:  # none can be scanned, so nothing else is needed
        return _announced(report, watch)
    if anchor is None:
        raise UsageError(
            "a text encoder is compared with a clean one: give --anchor, the encoder it was made"
            " from."
        )
    common, words = _common(anchor, prompts, settings, out, dtype, device)
    common = replace(common, textual_inversion=textual_inversion)
    if references:
        common = replace(common, references=_references(common, references, alpha, progress))
    report = replace(report, provenance=_provenance(common, str(anchor), words, references, alpha))
    for place, name in enumerate(named):
        entry = report.models[place]
        if entry.status is Status.PENDING:
            entry = _entry(common, name, progress)
        log.info("%d of %d: %s: %s", place + 1, len(named), name, entry.outcome)
        report = _announced(report.updated(place, entry), watch)
    return report


def _announced(report: ScanReport, watch: Watch | None) -> ScanReport:
    if watch is not None:
        watch(report)
    return report


def _kind(name: str) -> str | ModelError:
    try:
        return kind_of(name)
    except ModelError as error:
        return error


def _failed(name: str, error: object) -> ScannedModel:
    return ScannedModel(name, Status.FAILED, error=" ".join(str(error).split()))


def _entry(common: TextScan, name: str, progress: Progress | None) -> ScannedModel:
    def steps(done: int, total: int) -> None:
        if progress is not None:
            progress(name, done, total)

    try:
        return common.scan(name, steps)
    except MeasurementError:
        raise
    except GazeguardError as error:
        return _failed(name, error)


def _common(
    anchor: str | Path,
    prompts: str | Path | Sequence[str] | None,
    settings: Settings,
    out: str | Path | None,
    dtype: str,
    device: str,
) -> tuple[TextScan, str]:
    """Load what all scans share, and say where the prompts are from."""
    if prompts is None:
        words, source = built_in(settings.prompts), "built in"
    elif isinstance(prompts, str | Path):
        words, source = read_prompts(prompts), str(prompts)
    else:
        words, source = list(prompts), "given"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device '{device}' cannot be used here: give cpu or cuda.") from error
    clean = load_encoder(anchor, dtype=dtype, device=place)
    clean.check_finite()
    try:
        store = Store(None if out is None else Path(out))
    except OSError as error:
        raise UsageError(
            f"cannot write to {out} ({error.strerror}): choose another folder."
        ) from error
    return TextScan(clean, words, settings, clean.dtype, place, store), source


def _references(
    common: TextScan, names: Sequence[str | Path], alpha: float, progress: Progress | None
) -> References:
    """Scan the benign fine-tunes; asks first whether there are enough of them."""
    folders = expand([str(name) for name in names])
    References((0.0,) * len(folders), alpha)  # raises before hours of work
    common = replace(common, textual_inversion=False)
    scores = []
    for place, name in enumerate(folders):
        entry = _entry(common, name, progress)
        if entry.error:
            raise ModelError(entry.error)
        if "score" not in entry.numbers:
            raise ModelError(f"the reference {name} could not be measured: {entry.reason}")
        log.info(
            "reference %d of %d: %s: score %.2f",
            place + 1,
            len(folders),
            name,
            entry.numbers["score"],
        )
        scores.append(float(entry.numbers["score"]))
    return References(tuple(scores), alpha)


def _provenance(
    common: TextScan, anchor: str, words: str, references: Sequence[str | Path], alpha: float
) -> dict[str, Any]:
    folder = common.anchor.folder
    return {
        **environment(),
        "anchor": {
            "model": anchor,
            "fingerprint": "" if folder is None else digest(folder_hashes(folder)),
        },
        "prompts": {
            "source": words,
            "count": len(common.prompts),
            "fingerprint": digest(list(common.prompts)),
        },
        "references": [str(name) for name in references],
        "alpha": alpha if references else None,
        "settings": common.settings.as_dict(),
        "seed": common.settings.seed,
        "dtype": str(common.dtype).removeprefix("torch."),
        "device": str(common.device),
    }
