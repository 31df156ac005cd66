"""Per-layer numbers that the JSON and the HTML report share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gazeguard.report.model import CleanReport


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One decoder layer. Entropies in nats; None where there is nothing to average."""

    layer: int
    bsi: float | None
    selected: bool
    mean_entropy_kept: float | None
    mean_entropy_flagged: float | None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _mean(values: NDArray[np.float32]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if finite.size else None


def layer_rows(report: CleanReport) -> list[LayerRow]:
    """Separation and average entropy of every measured layer, in layer order."""
    stats = {stat.layer: stat for stat in report.result.layer_stats}
    flagged = np.asarray(report.result.is_flagged, dtype=bool)
    rows = []
    for column, layer in enumerate(report.layers):
        stat = stats.get(layer)
        values = report.entropy[:, column]
        rows.append(
            LayerRow(
                layer=layer,
                bsi=None if stat is None else _finite(stat.bsi),
                selected=stat is not None and stat.selected,
                mean_entropy_kept=_mean(values[~flagged]),
                mean_entropy_flagged=_mean(values[flagged]),
            )
        )
    return rows
