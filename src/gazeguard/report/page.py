"""What the HTML page says: the data its script draws and the sentences around it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.data.thumbnails import gallery_url, thumbnail_url
from gazeguard.jsonable import jsonable
from gazeguard.report import words
from gazeguard.report.heat import MAX_PICTURES, heat_bytes
from gazeguard.report.histogram import Histogram, histogram
from gazeguard.report.layers import LayerRow, layer_rows
from gazeguard.report.model import (
    CleanReport,
    GalleryItem,
    Proof,
    Thumbnails,
    answer_groups,
    causes,
    explanation,
    near_misses,
    selected_layers,
    thresholds,
)
from gazeguard.types import CleaningResult, Component, Outcome, SkippedRow

THUMBNAIL_GROUP = 50
TABLE_TEXT = 300
GALLERY_TEXT = 500
THRESHOLD_NAMES = {
    "suspicion": "Suspicion of a row",
    "bsi": "Separation of a layer (BSI)",
    "separation": "Separation of a group (BSI)",
}
SKIPPED_KINDS = 50
MAX_LISTED = 100
SKIPPED_ROWS_PER_KIND = 40


def _flagged_order(report: CleanReport) -> NDArray[np.int64]:
    """Positions of the flagged rows, most suspicious first; among equals the score decides."""
    flagged = np.flatnonzero(report.result.is_flagged)
    suspicion = np.nan_to_num(report.result.suspicion[flagged], nan=0.0)
    keys = (report.rows[flagged], report.result.score[flagged], -suspicion)
    order: NDArray[np.int64] = flagged[np.lexsort(keys)]
    return order


def _table(
    report: CleanReport, thumbnails: Thumbnails | None, max_rows: int
) -> list[dict[str, Any]]:
    shown = _flagged_order(report)[:max_rows]
    table = []
    for start in range(0, len(shown), THUMBNAIL_GROUP):
        group = shown[start : start + THUMBNAIL_GROUP]
        numbers = [int(report.rows[i]) for i in group]
        images = {} if thumbnails is None else thumbnails(numbers)
        for i, row in zip(group.tolist(), numbers, strict=True):
            picture = images.get(row)
            table.append(
                {
                    "row": row,
                    "turn": report.turn(i),
                    "id": report.sample_ids[i],
                    "prompt": words.shorten(report.prompts[i], TABLE_TEXT),
                    "answer": words.shorten(report.answers[i], TABLE_TEXT),
                    "suspicion": float(np.round(report.result.suspicion[i], 4)),
                    "score": float(np.round(report.result.score[i], 4)),
                    "image": None if picture is None else thumbnail_url(picture.image),
                    "file": "" if picture is None else picture.name,
                }
            )
    return table


def _gallery_items(report: CleanReport, max_gallery: int) -> list[GalleryItem]:
    typical = [] if report.typical is None else [report.typical]
    return typical + report.gallery[:max_gallery]


def _heat(report: CleanReport, max_gallery: int) -> dict[str, list[dict[str, Any]]]:
    """Row -> for each of its pictures, layer -> heat map, for the rows shown large."""
    return {
        item.key: [_maps(item, i) for i in range(len(item.pictures[:MAX_PICTURES]))]
        for item in _gallery_items(report, max_gallery)
    }


def _maps(item: GalleryItem, picture: int) -> dict[str, Any]:
    """Layer -> heat map of one picture."""
    others = [p.heat for i, p in enumerate(item.pictures) if i != picture and p.heat]
    drawn = {
        str(layer): heat_bytes(grid, [heat[layer] for heat in others])
        for layer, grid in (item.pictures[picture].heat or {}).items()
    }
    return {layer: heat for layer, heat in drawn.items() if heat is not None}


def _heat_layers(heat: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[int]:
    """Layers the reader can choose from, in layer order."""
    return sorted({int(layer) for maps in heat.values() for one in maps for layer in one})


def _first_heat_layer(report: CleanReport, available: Sequence[int]) -> int | None:
    """The layer that separates the rows best among those the verdict used."""
    bsi = {s.layer: s.bsi if np.isfinite(s.bsi) else 0.0 for s in report.result.layer_stats}
    used = [layer for layer in available if layer in set(selected_layers(report))]
    return max(used or available, key=lambda layer: bsi.get(layer, 0.0), default=None)


def _curves(report: CleanReport, bins: Histogram | None) -> list[Component]:
    """Components that are wide enough to be drawn over bars."""
    if bins is None:
        return []
    bar = (bins.high - bins.low) / len(bins.kept)
    return [
        part
        for part in report.result.components
        if np.isfinite(part.mean) and np.isfinite(part.std) and part.std > bar / 4
    ]


def page_data(
    report: CleanReport, thumbnails: Thumbnails | None, *, max_rows: int, max_gallery: int
) -> dict[str, Any]:
    """The numbers and pictures the page's script works on, as JSON types."""
    bins = histogram(report.result)
    heat = _heat(report, max_gallery)
    bsi = thresholds(report).get("bsi")
    return {
        "histogram": bins,
        "curves": _curves(report, bins),
        "measured": 0 if bins is None else sum(bins.kept) + sum(bins.flagged),
        "scoreName": report.result.score_name,
        "cut": cut(report.result),
        "layers": layer_rows(report),
        "bsiThreshold": None if bsi is None else bsi.value,
        "rows": _table(report, thumbnails, max_rows),
        "heat": heat,
    }


def cut(result: CleaningResult) -> float | None:
    """Score between the removed rows and the kept ones; None where both lie on either side."""
    finite = np.isfinite(result.score)
    removed = result.score[finite & result.is_flagged]
    kept = result.score[finite & ~result.is_flagged]
    if not removed.size or not kept.size or removed.max() >= kept.min():
        return None
    return float(removed.max() + kept.min()) / 2


def _lede(report: CleanReport) -> str:
    if report.result.verdict.outcome is not Outcome.INCONCLUSIVE:
        return explanation(report)
    if not report.counts["removed"]:
        return (
            "Nothing was removed. This is not an all-clear: the measurement did not allow a "
            "judgement."
        )
    return "This is not an all-clear: the measurement did not allow a judgement."


def _next_step(report: CleanReport) -> str:
    kept = report.files.get("kept")
    if report.result.verdict.outcome is Outcome.FLAGGED and not report.counts["removed"]:
        return (
            "Look through the suspected rows below; the same command with --remove suspected takes"
            " them out."
        )
    if report.result.verdict.outcome is Outcome.FLAGGED:
        where = f"the kept rows ({kept})" if kept else "the kept rows"
        return (
            "Look through the removed rows below, then fine-tune again from the original base "
            f"model on {where}; the model measured here has already learnt from the removed ones."
        )
    if report.result.verdict.outcome is Outcome.CLEAN:
        return "The set can be used as it is, within the limits named at the end of this page."
    return "Treat the set as unchecked until a run with the cause removed gives an answer."


def _histogram_alt(report: CleanReport, bins: Histogram) -> str:
    parts = [
        f"Histogram of {report.result.score_name} over {len(bins.kept)} bins from "
        f"{bins.low:.3g} to {bins.high:.3g}: {words.plural(sum(bins.kept), 'row')} kept, "
        f"{words.count(sum(bins.flagged))} removed."
    ]
    for part in report.result.components:
        kind = "suspicious" if part.suspicious else "usual"
        parts.append(
            f"The fitted component of {kind} rows has mean {part.mean:.3g}, standard deviation "
            f"{part.std:.3g} and holds {100 * part.weight:.1f} % of the rows."
        )
    return " ".join(parts)


def _histogram_text(
    report: CleanReport, bins: Histogram | None, line: float | None
) -> dict[str, Any] | None:
    if bins is None:
        return None
    notes = []
    if bins.beyond:
        verb = "is" if bins.beyond == 1 else "are"
        rows = words.plural(bins.beyond, "row")
        notes.append(f"{rows} beyond the ends {verb} in the outer bins.")
    if bins.missing:
        notes.append(f"{words.plural(bins.missing, 'row')} without a finite score are not drawn.")
    narrow = len(report.result.components) - len(_curves(report, bins))
    if narrow:
        notes.append(
            f"{words.plural(narrow, 'fitted group')} narrower than a bar, so without a curve."
        )
    outcome = report.result.verdict.outcome
    caption = "Each bar counts rows with a similar score"
    if not report.result.components:
        caption += "; no pair of components describes them, so no curves are drawn."
    elif outcome is Outcome.FLAGGED:
        caption += ": the lower, the further it is from what the other rows do."
        caption += (
            " Words and score decide together, so no single line divides removed rows from kept."
            if line is None
            else " Rows left of the dashed line were removed."
        )
    else:
        caption += (
            ". The curves are the best two groups that could be drawn over them, which is always"
            " possible; they did not pass as evidence, for the reason at the top of this page."
        )
    edges = bins.edges
    return {
        "alt": _histogram_alt(report, bins),
        "caption": caption,
        "notes": notes,
        "bins": [
            (float(edges[i]), float(edges[i + 1]), bins.kept[i], bins.flagged[i])
            for i in range(len(bins.kept))
        ],
    }


def _layers_alt(layers: Sequence[LayerRow]) -> str:
    measured = [row for row in layers if row.bsi is not None]
    if not measured:
        return f"No separation could be measured in any of {len(layers)} layers."
    best = max(measured, key=lambda row: row.bsi or 0.0)
    used = ", ".join(str(row.layer) for row in layers if row.selected) or "none"
    return (
        f"Bar chart of the separation index of {words.plural(len(layers), 'layer')}: highest "
        f"{best.bsi:.2f} in layer {best.layer}; layers used: {used}."
    )


def _gallery_text(report: CleanReport, item: GalleryItem) -> dict[str, Any]:
    return {
        "name": words.row_name(item.row, item.turn),
        "key": item.key,
        "id": item.sample_id,
        "prompt": words.shorten(item.prompt, GALLERY_TEXT),
        "answer": words.shorten(item.answer, GALLERY_TEXT),
        "suspicion": item.suspicion,
        "images": [
            (gallery_url(picture.image), picture.name) for picture in item.pictures[:MAX_PICTURES]
        ],
        "more_images": max(0, len(item.pictures) - MAX_PICTURES),
    }


def near_miss_rows(report: CleanReport, *, removed: bool) -> dict[str, Any]:
    """How many rows only share a removed group's words, and the nearest of them."""
    found = near_misses(report, removed=removed)
    return {
        "count": len(found),
        "rows": [
            {
                "name": report.name(miss.place),
                "id": report.sample_ids[miss.place],
                "phrase": words.shorten(miss.phrase, TABLE_TEXT),
                "answer": words.shorten(report.answers[miss.place], TABLE_TEXT),
                "score": float(report.result.score[miss.place]),
            }
            for miss in found[:MAX_LISTED]
        ],
    }


def suspected_rows(report: CleanReport) -> dict[str, Any]:
    """How many kept rows are suspected, and the worst of them."""
    places = np.flatnonzero(report.result.is_suspected)
    order = places[np.argsort(-report.result.suspicion[places], kind="stable")]
    return {
        "count": report.counts["suspected"],
        "rows": [
            {
                "name": report.name(place),
                "id": report.sample_ids[place],
                "answer": words.shorten(report.answers[place], TABLE_TEXT),
                "suspicion": float(report.result.suspicion[place]),
            }
            for place in order[:MAX_LISTED].tolist()
        ],
    }


def skipped_groups(skipped: Sequence[SkippedRow]) -> list[dict[str, Any]]:
    """Skipped rows by kind of reason, the most frequent first."""
    groups: defaultdict[str, list[SkippedRow]] = defaultdict(list)
    for row in skipped:
        groups[words.reason_kind(row.reason)].append(row)
    ordered = sorted(groups.values(), key=lambda rows: (-len(rows), rows[0].row))
    return [
        {
            "count": len(rows),
            "example": words.shorten(rows[0].reason, 240),
            "several": len({row.reason for row in rows}) > 1,
            "rows": ", ".join(words.count(row.row) for row in rows[:SKIPPED_ROWS_PER_KIND]),
            "more": max(0, len(rows) - SKIPPED_ROWS_PER_KIND),
        }
        for rows in ordered
    ]


def page_text(report: CleanReport, data: Mapping[str, Any], *, max_gallery: int) -> dict[str, Any]:
    """Everything the template prints."""
    result, counts = report.result, report.counts
    layers: list[LayerRow] = data["layers"]
    heat_layers = _heat_layers(data["heat"])
    groups = skipped_groups(report.skipped)
    return {
        "outcome": result.verdict.outcome.value,
        "lede": _lede(report),
        "next_step": _next_step(report),
        "method": result.method,
        "rule": result.rule,
        "suspicion": result.verdict.suspicion,
        "evidence": [finding.message for finding in result.verdict.evidence],
        "counts": counts,
        "histogram": _histogram_text(report, data["histogram"], data["cut"]),
        "score_name": result.score_name,
        "components": result.components,
        "curves": data["curves"],
        "layers": layers,
        "layers_alt": _layers_alt(layers),
        "used_layers": [row.layer for row in layers if row.selected],
        "thresholds": thresholds(report),
        "groups": answer_groups(report),
        "needed": report.result.info.get("separation_asked", ""),
        "proofs": [_proof_text(proof) for proof in report.proofs],
        "cut": data["cut"],
        "threshold_names": THRESHOLD_NAMES,
        "shown_rows": len(data["rows"]),
        "flagged_rows": int(result.is_flagged.sum()),
        "typical": None if report.typical is None else _gallery_text(report, report.typical),
        "gallery": [_gallery_text(report, item) for item in report.gallery[:max_gallery]],
        "heat_layers": heat_layers,
        "first_heat_layer": _first_heat_layer(report, heat_layers),
        "causes": causes(report.skipped),
        "beyond": report.beyond,
        "suspected": suspected_rows(report),
        "near_kept": near_miss_rows(report, removed=False),
        "near_removed": near_miss_rows(report, removed=True),
        "skipped_groups": groups[:SKIPPED_KINDS],
        "skipped_hidden": sum(group["count"] for group in groups[SKIPPED_KINDS:]),
        "files": dict(report.files),
        "provenance": words.flatten(_plain(report.provenance)),
        "parameters": words.flatten(_plain(result.info)),
    }


def _proof_text(proof: Proof) -> dict[str, Any]:
    return {
        "sentence": proof.sentence,
        "form": proof.form,
        "words": proof.words,
        "trigger": None if proof.trigger is None else gallery_url(proof.trigger),
        "before": proof.firing is not None and proof.firing.before is not None,
        "trials": [
            {
                "row": words.row_name(trial.row, None),
                "prompt": words.shorten(trial.prompt, GALLERY_TEXT),
                "pictures": [gallery_url(trial.untouched), gallery_url(trial.triggered)],
                "said": words.shorten(trial.said, GALLERY_TEXT),
                "said_triggered": words.shorten(trial.said_triggered, GALLERY_TEXT),
                "said_before": words.shorten(trial.said_before or "", GALLERY_TEXT),
            }
            for trial in proof.trials
        ],
    }


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    converted: dict[str, Any] = jsonable(value)
    return converted
