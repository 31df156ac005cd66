"""From a scanner's call to an entry of the report: a model that cannot be used is one too."""

from __future__ import annotations

from collections.abc import Callable

from gazeguard.errors import GazeguardError, MeasurementError
from gazeguard.scanning.result import ScannedModel, Status

Progress = Callable[[str, int, int], None]
"""Called with a model, steps done and steps in all."""

ScanOne = Callable[[str, Callable[[int, int], None] | None], ScannedModel]


def failed(name: str, error: object) -> ScannedModel:
    """The entry of a model that could not be scanned."""
    return ScannedModel(name, Status.FAILED, error=" ".join(str(error).split()))


def steps_of(name: str, progress: Progress | None) -> Callable[[int, int], None]:
    """Tells the progress of one model."""

    def steps(done: int, total: int) -> None:
        if progress is not None:
            progress(name, done, total)

    return steps


def entry_of(scan: ScanOne, name: str, progress: Progress | None) -> ScannedModel:
    """Scan one model; an error that the user can act on becomes its entry.

    Raises:
        MeasurementError: what all models are compared with cannot be measured.
    """
    try:
        return scan(name, steps_of(name, progress))
    except MeasurementError:
        raise
    except GazeguardError as error:
        return failed(name, error)
