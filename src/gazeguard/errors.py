"""Every error gazeguard raises on purpose.

::

    GazeguardError                     one sentence with the cure; the CLI prints no traceback
    ├── UsageError (ValueError)        the call is wrong: bad option, unusable output folder
    ├── ModelError (ValueError)        the model cannot be used: wrong kind, broken files
    ├── DataError (ValueError)         the data set as a whole cannot be used
    │   └── RowError                   one row cannot be read; callers turn it into a `SkippedRow`
    ├── MeasurementError (RuntimeError)  the model ran, but its numbers cannot be judged (NaN)
    ├── WorkerLost (RuntimeError)      a process of a cluster died each time it did this work
    ├── RefusedError (RuntimeError)    a guarded call was stopped; carries the verdicts
    └── MissingExtra (ImportError)     an optional dependency is not installed

Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gazeguard.guarding.verdict import GuardVerdict
    from gazeguard.types import SkipKind  # at run time it would bring numpy into `--help`


class GazeguardError(Exception):
    """Base class: a mistake or limit the user can act on."""


class UsageError(GazeguardError, ValueError):
    """The call itself is wrong."""


class ModelError(GazeguardError, ValueError):
    """The model, processor or adapter cannot be used."""


class DataError(GazeguardError, ValueError):
    """The data set as a whole cannot be used."""


class RowError(DataError):
    """One row cannot be read; the rest of the set can.

    Attributes:
        kind: the `SkipKind` of the row; None for `BAD_ROW`.
    """

    def __init__(self, why: str, kind: SkipKind | None = None) -> None:
        super().__init__(why)
        self.kind = kind


class MeasurementError(GazeguardError, RuntimeError):
    """The model ran, but what was measured cannot be judged."""


class WorkerLost(GazeguardError, RuntimeError):
    """A process of a cluster died each time it did this work."""


class RefusedError(GazeguardError, RuntimeError):
    """A guarded call was stopped before its answer was written.

    Attributes:
        verdicts: one per request of the call, the innocent ones of the batch too.
    """

    def __init__(self, verdicts: Sequence[GuardVerdict], why: str) -> None:
        super().__init__(why)
        self.verdicts = tuple(verdicts)


class MissingExtra(GazeguardError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}': run `pip install 'gazeguard[{extra}]'`."
        )
