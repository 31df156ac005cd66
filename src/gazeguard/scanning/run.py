"""Scanning a list of models, one after the other or side by side; a killed run can go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gazeguard.cluster import Ray
from gazeguard.errors import ModelError, UsageError, WorkerLost
from gazeguard.methods.amdet import Settings
from gazeguard.models.encoders.load import encoders_of
from gazeguard.provenance import environment
from gazeguard.scanning.entry import Progress, ScanOne, entry_of, failed
from gazeguard.scanning.making import cache_folder
from gazeguard.scanning.models import TEXT_ENCODER, VISION_LANGUAGE, expand, kind_of
from gazeguard.scanning.options import VisionOptions
from gazeguard.scanning.prepare_text import Pair, pairs, prepare_text
from gazeguard.scanning.prepare_vision import prepare_vision
from gazeguard.scanning.result import ScannedModel, ScanReport, Status
from gazeguard.scanning.spread import Hands, hands
from gazeguard.scanning.store import Store

log = logging.getLogger("gazeguard.scan")

Watch = Callable[[ScanReport], None]


def scan(
    models: Sequence[str | Path] | str | Path,
    anchor: str | Path | None = None,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    references: Sequence[str | Path] = (),
    alpha: float = 0.05,
    settings: Settings | None = None,
    vision: VisionOptions | None = None,
    out: str | Path | None = None,
    textual_inversion: bool = False,
    target_images: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    ray: Ray | None = None,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> ScanReport:
    """Say for each model whether somebody planted a backdoor in it.

    Text encoders go to AMDET; vision-language models, and adapters on one, to EntropyScan. A
    model that cannot be used is an entry of its own and does not stop the others.

    Args:
        models: hub ids, folders, globs, files with one model a line. Every encoder of a diffusers
            pipeline is a model of its own.
        anchor: the clean encoder that text encoders were made from, or a clean pipeline.
        prompts: for text encoders: a file, or a list; the built-in ones when None.
        references: known-clean models, each for the suspects of its kind. Text encoders: benign
            fine-tunes of the anchor; the threshold is then calibrated on them. Vision-language
            models: the base that the suspects were made from (the first whole model), and benign
            fine-tunes of it, whole or adapters.
        alpha: share of benign models that may be flagged.
        settings: of AMDET.
        vision: samples and settings of EntropyScan.
        out: a folder for results; a run in the same folder takes finished ones from there.
        textual_inversion: also write a file that diffusers loads.
        target_images: for text encoders in a whole image-text model: a folder; its images nearest
            to the recovered target are shown.
        dtype: `auto` (float32 for text encoders, else the checkpoint's own), or a name.
        device: where to run; auto takes a GPU when there is one.
        ray: a cluster whose workers scan the models side by side. Relative paths are looked for in
            the same folder on every machine, and `out` is on storage that all of them share.
        watch: called with the report before the first model and after each.
        progress: called with the model, steps done and steps in all; with `ray`, with the number
            of models, those done and those in all.

    Raises:
        UsageError: what one of the kinds needs is missing; an unusable output folder or cluster.
        MissingExtra: `ray` is given and not installed.
        DataError: prompts, samples or target images cannot be read.
        ModelError: anchor, base or a reference cannot be used.
    """
    named = expand([str(models)] if isinstance(models, str | Path) else [str(m) for m in models])
    vision = vision or VisionOptions()
    known = expand([str(name) for name in references]) if references else []
    if vision.adapter is not None:
        named, known = _with_adapter(named, known, str(vision.adapter))
    report = ScanReport(tuple(ScannedModel(name) for name in named), False, {})
    if watch is not None:
        watch(report)
    named = list(dict.fromkeys(encoder for name in named for encoder in _encoders(name)))
    known = [encoder for name in known for encoder in encoders_of(name)]
    report = ScanReport(tuple(ScannedModel(name) for name in named), False, {})
    kinds = [_kind(name) for name in named]
    for place, (name, kind) in enumerate(zip(named, kinds, strict=True)):
        if isinstance(kind, ModelError):
            report = report.updated(place, failed(name, kind))
    if report.finished:  # none can be scanned, so nothing else is needed
        return _announced(report, watch)
    store = _store(out)
    scanners: dict[str, ScanOne] = {}
    record: dict[str, Any] = environment()
    of_kind = {kind: [n for n in known if kind_of(n) == kind] for kind in set(map(str, kinds))}
    with hands(ray, _shared(store, vision)) as workers:
        steps = progress if workers.here else None
        if device == "auto" and not workers.has_gpu:
            device = "cpu"
        if VISION_LANGUAGE in kinds:
            asked = [n for n, kind in zip(named, kinds, strict=True) if kind == VISION_LANGUAGE]
            seen, more = prepare_vision(
                asked, of_kind[VISION_LANGUAGE], alpha, vision, store, dtype, device, steps, workers
            )
            scanners |= dict.fromkeys(asked, seen.scan)
            record["vision"] = more
        if TEXT_ENCODER in kinds:
            asked = [n for n, kind in zip(named, kinds, strict=True) if kind == TEXT_ENCODER]
            paired = pairs(asked, None if anchor is None else str(anchor))
            for name, left_out in paired.items():
                if isinstance(left_out, ScannedModel):
                    report = report.updated(named.index(name), left_out)
            for pair in dict.fromkeys(p for p in paired.values() if isinstance(p, Pair)):
                read, more = prepare_text(
                    pair.anchor,
                    prompts,
                    pair.among(of_kind[TEXT_ENCODER]),
                    alpha,
                    settings or Settings(),
                    store,
                    textual_inversion,
                    target_images,
                    dtype,
                    device,
                    steps,
                    workers,
                )
                scanners |= {n: read.scan for n, other in paired.items() if other == pair}
                record |= {pair.place: more} if "anchor" in record else more
        report = replace(report, provenance=record)
        return _scanned(report, scanners, workers, watch, progress)


def _scanned(
    report: ScanReport,
    scanners: dict[str, ScanOne],
    workers: Hands,
    watch: Watch | None,
    progress: Progress | None,
) -> ScanReport:
    """The report, with the models that have a scanner scanned."""
    named = [model.model for model in report.models]
    done = len(named) - len(scanners)
    for model in report.models:
        if model.status is not Status.PENDING:
            log.info("%s: %s", model.model, model.outcome)
    if done:
        _announced(report, watch)
    scan_one = partial(_scan_one, scanners, progress if workers.here else None)
    items = [name for name in named if name in scanners]
    for place, entry in workers.each(scan_one, items):
        name, done = items[place], done + 1
        if isinstance(entry, WorkerLost):
            entry = failed(name, f"{name} could not be scanned: {entry}")
        log.info("%d of %d: %s: %s", done, len(named), name, entry.outcome)
        report = _announced(report.updated(named.index(name), entry), watch)
        if progress is not None and not workers.here:
            progress(f"{len(named)} models", done, len(named))
    return report


def _scan_one(scanners: dict[str, ScanOne], progress: Progress | None, name: str) -> ScannedModel:
    return entry_of(scanners[name], name, progress)


def _shared(store: Store, vision: VisionOptions) -> list[Path]:
    """Folders that workers write to."""
    made = [cache_folder(store.out)] if vision.make_references else []
    return [store.out or made[0]] if store.out or made else []


def _with_adapter(named: list[str], known: list[str], adapter: str) -> tuple[list[str], list[str]]:
    """`MODEL --adapter A` is the adapter A, with MODEL as the base."""
    if len(named) != 1:
        raise UsageError("--adapter goes with one MODEL, its base: give a list of adapters alone.")
    return [adapter], [named[0], *(name for name in known if name != named[0])]


def _store(out: str | Path | None) -> Store:
    try:
        return Store(None if out is None else Path(out))
    except OSError as error:
        raise UsageError(
            f"cannot write to {out} ({error.strerror}): choose another folder."
        ) from error


def _announced(report: ScanReport, watch: Watch | None) -> ScanReport:
    if watch is not None:
        watch(report)
    return report


def _encoders(name: str) -> list[str]:
    """The encoders of a pipeline; a name that cannot be used is told of by its own entry."""
    try:
        return encoders_of(name)
    except ModelError:
        return [name]


def _kind(name: str) -> str | ModelError:
    try:
        return kind_of(name)
    except ModelError as error:
        return error
