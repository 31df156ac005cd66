"""What all scans of vision-language models share: the base, the samples, the references."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gazeguard.calibrate import needed_samples
from gazeguard.errors import MeasurementError, ModelError, UsageError, WorkerLost
from gazeguard.methods.entropyscan import Sight
from gazeguard.models.device import chosen_device
from gazeguard.models.files import is_adapter, resolve
from gazeguard.scanning.entry import Progress, steps_of
from gazeguard.scanning.making import ReferenceMaker, cache_folder, tuning_rows
from gazeguard.scanning.options import VisionOptions
from gazeguard.scanning.samples import SampleSet
from gazeguard.scanning.spread import Hands
from gazeguard.scanning.store import Store, digest
from gazeguard.scanning.subject import Subject, recorded_base
from gazeguard.scanning.vision import VisionScan

log = logging.getLogger("gazeguard.scan")


def prepare_vision(
    suspects: Sequence[str],
    references: Sequence[str],
    alpha: float,
    options: VisionOptions,
    store: Store,
    dtype: str,
    device: str,
    progress: Progress | None,
    hands: Hands,
) -> tuple[VisionScan, dict[str, Any]]:
    """Look at the base and the references; gives the scanner and its provenance.

    Args:
        suspects: names, to find the base that adapters name.
        references: the first whole model is the base; the others are benign fine-tunes.
        alpha: share of benign models that may be flagged.
        options: samples, settings and how many references to make.
        store: of sights and results.
        dtype: of all models.
        device: of all models.
        progress: called with a model, samples done and samples in all.
        hands: those who look.

    Raises:
        UsageError: no samples, or no base.
        DataError: the samples cannot be read.
        ModelError: the base or a reference cannot be used.
    """
    needed = needed_samples(alpha)
    if options.samples is None:
        raise UsageError(
            "a vision-language model is judged by what it does on harmless pictures: give"
            " --samples, a data set of them."
        )
    base, others = _base(suspects, references)
    images = None if options.images is None else Path(options.images)
    samples = SampleSet(Path(options.samples), images, options.settings.samples)
    place, why = hands.call(chosen_device, device)
    log.info("Device %s (%s).", place, why)
    if 0 < len(others) + options.make_references < needed:
        log.warning(
            "%d references cannot flag anything at --alpha %g, which takes %d: the scan will be"
            " inconclusive.",
            len(others) + options.make_references,
            alpha,
            needed,
        )
    make = None
    if options.make_references:
        make = ReferenceMaker(
            base,
            options.make_references,
            tuning_rows(samples, images),
            cache_folder(store.out),
            options.reference_steps,
            dtype,
            place,
            progress,
        )
    scanner = VisionScan(
        base,
        _distinct(base, others),
        samples,
        options.settings,
        alpha,
        dtype,
        place,
        options.batch_size,
        store,
        make,
    )
    _look_at_known(scanner, progress, hands)
    if make is not None and not hands.here:  # one worker makes them, all others find them
        scanner.know(hands.call(scanner.look_ahead, suspects))
    return scanner, {
        "base": {"model": base.name, "fingerprint": digest(base.hashes)},
        "references": [reference.name for reference in scanner.references],
        "made_references": options.make_references,
        "reference_steps": options.reference_steps,
        "alpha": alpha,
        "samples": {
            "path": str(samples.path),
            "count": len(samples),
            "unreadable": len(samples.skipped),
            "fingerprint": samples.fingerprint,
        },
        "settings": options.settings.as_dict(),
        "dtype": dtype,
        "device": place,
    }


def _base(suspects: Sequence[str], references: Sequence[str]) -> tuple[Subject, list[str]]:
    """The base, and the names of the other references."""
    for place, name in enumerate(references):
        folder = resolve(name)
        if not is_adapter(folder):
            return Subject(name, folder), [*references[:place], *references[place + 1 :]]
    for name in (*suspects, *references):
        folder = resolve(name)
        recorded = recorded_base(folder) if is_adapter(folder) else None
        if recorded is not None:
            return Subject(recorded, resolve(recorded)), list(references)
    raise UsageError(
        "a vision-language model is compared with the one it was made from: give that with"
        " --reference."
    )


def _distinct(base: Subject, names: Sequence[str]) -> list[Subject]:
    """References that are fine-tunes of the base, each content once."""
    found: dict[str, Subject] = {}
    for name in names:
        reference = Subject.of(name, base.folder)
        if reference.difference(base.folder).kind == "none":
            log.warning("%s is the base itself and no fine-tune: left out.", name)
            continue
        key = digest(reference.hashes)
        if key in found:
            log.warning("%s is the same as %s: counted once.", name, found[key].name)
        found.setdefault(key, reference)
    return list(found.values())


def _look_at_known(scanner: VisionScan, progress: Progress | None, hands: Hands) -> None:
    for known in ((scanner.base,), scanner.references):  # the others are compared with the base
        for place, seen in hands.each(partial(_look, scanner, progress), known):
            if isinstance(seen, WorkerLost):
                raise ModelError(f"the reference {known[place].name} cannot be used: {seen}")
            scanner.know(seen)


def _look(scanner: VisionScan, progress: Progress | None, subject: Subject) -> dict[str, Sight]:
    try:
        scanner.look_at(subject, steps_of(subject.name, progress))
        return scanner.seen
    except MeasurementError as error:
        raise ModelError(f"the reference {subject.name} cannot be used: {error}") from error
