"""The files of one `gazeguard clean` run, each written whole or not at all, `report.json` last."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gazeguard.cleaning.gallery import thumbnails
from gazeguard.cleaning.measure import BEFORE
from gazeguard.errors import UsageError
from gazeguard.files import write_bytes, writing
from gazeguard.files import write_json as write_json_file
from gazeguard.report.html import write_html
from gazeguard.report.json import KIND, write_json
from gazeguard.report.model import NO_PICTURE, CleanReport, Proof
from gazeguard.types import CleaningResult, Outcome, Profile, SkippedRow

if TYPE_CHECKING:
    from gazeguard.data.dataset import Dataset

REPORT = "report.json"
NOTE = ".work/outputs.json"  # names that an unfinished run may have written
_PART_ROWS = 4096  # of the data set, written at once
FOLLOWS = "follows the main pattern of the set"


def prepare_folder(out: Path, dataset: Dataset) -> None:
    """Make the output folder and check that it can be written, before any work is done.

    Raises:
        UsageError: it is a file, cannot be written, lies inside the data set, or holds files of
            the user's under names that this run will use.
    """
    inside, source = out.resolve(), dataset.path.resolve()
    if source.is_dir() and (inside == source or source in inside.parents):
        raise UsageError(
            f"{out} lies inside the data set {dataset.path}: choose another --out folder."
        )
    _refuse_foreign(out, _names(dataset))
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        write_bytes(probe, b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"Cannot write to the output folder {out} ({error.strerror}): "
            "choose another --out folder or free some space."
        ) from error


def _names(dataset: Dataset) -> dict[str, str]:
    """What -> file, in the order of writing."""
    return {
        **{what: what + dataset.suffix for what in ("kept", "removed", "skipped")},
        "reasons": "reasons.jsonl",
        "verdicts": "verdicts.parquet",
        "profile": "profile.parquet",
        "html": "report.html",
        "json": REPORT,
    }


def _ours(out: Path) -> set[str]:
    """Names in `out` that an earlier run wrote: by its report, or the note of one that was cut."""
    found: set[str] = set()
    for source in (out / REPORT, out / NOTE):
        try:
            content = json.loads(source.read_text("utf-8"))
            if content["kind"] == KIND:
                found |= set(map(str, content["files"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
    return {name for name in found if name == Path(name).name and name not in ("", ".", "..")}


def _refuse_foreign(out: Path, files: Mapping[str, str]) -> None:
    ours = _ours(out)
    foreign = [n for n in files.values() if n not in ours and os.path.lexists(out / n)]
    if foreign:
        raise UsageError(
            f"{out} holds {', '.join(foreign)} that no earlier run of gazeguard clean wrote: move"
            " it away or choose another --out folder."
        )


def remove_previous(out: Path) -> None:
    """Take away the files of an earlier run, so that two runs are never mixed.

    Only what that run wrote is removed, and the report first: a folder without one is a folder
    whose run did not end.
    """
    for name in sorted(_ours(out), key=lambda name: name != REPORT):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_outputs(
    out: Path,
    dataset: Dataset,
    profile: Profile,
    report: CleanReport,
    kept: NDArray[np.int64],
    removed: NDArray[np.int64],
    unmeasured: list[SkippedRow],
    text_only: NDArray[np.int64],
) -> CleanReport:
    """Write every file of a run and give the report that names them.

    Raises:
        UsageError, OSError: a file cannot be written; the folder then has no `report.json`.
    """
    files = _names(dataset)
    _refuse_foreign(out, files)
    (out / NOTE).parent.mkdir(exist_ok=True)
    ours = {name: name for name in sorted(_ours(out))}
    write_json_file(out / NOTE, {"kind": KIND, "files": ours | files})
    remove_previous(out)
    dataset.write(kept, out / "kept")
    dataset.write(removed, out / "removed")
    dataset.write([s.row for s in report.skipped], out / "skipped")
    report = replace(report, files=files)
    write_reasons(out / files["reasons"], report.skipped)
    not_judged = [*unmeasured, *(SkippedRow(row, NO_PICTURE) for row in text_only.tolist())]
    write_verdicts(out / files["verdicts"], profile, report.result, not_judged, report.proofs)
    write_profile(out / files["profile"], profile)
    write_html(report, out / files["html"], partial(thumbnails, dataset))
    write_json(report, out / files["json"])
    return report


def write_reasons(path: Path, skipped: Iterable[SkippedRow]) -> None:
    """One JSON object per line: `row`, `sample_id` (null when unreadable), `cause`, `reason`."""
    lines = (
        json.dumps({"row": s.row, "sample_id": s.sample_id, "cause": s.kind, "reason": s.reason})
        for s in skipped
    )
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode("utf-8"))


def write_verdicts(
    path: Path,
    profile: Profile,
    result: CleaningResult,
    unmeasured: Sequence[SkippedRow],
    proofs: Sequence[Proof] = (),
) -> None:
    """One line per input row, in input order.

    Columns: `row`, `turn` (which of the row's answers the line speaks of, from 1: the worst one;
    null when none was measured), `sample_id`, `is_flagged` (removed), `is_suspected` (kept),
    `suspicion` (null when the row was not judged), `reason`, `method` (`bye/robust`).
    """
    judged = result.verdict.outcome is not Outcome.INCONCLUSIVE
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("turn", pa.int64()),
            ("sample_id", pa.string()),
            ("is_flagged", pa.bool_()),
            ("is_suspected", pa.bool_()),
            ("suspicion", pa.float64()),
            ("reason", pa.string()),
            ("method", pa.string()),
        ]
    )
    method = {"method": f"{result.method}/{result.rule}"}
    says = {miss.place: miss.phrase for miss in result.near_misses}
    taught = {name: proof.phrase for proof in proofs for name in proof.rows}
    others = deque(sorted(unmeasured, key=lambda s: s.row))
    worst = _worst(profile, result)
    with _parquet(path, schema) as write:
        for part in _parts(len(worst)):
            end = profile.row[worst[part.stop]] if part.stop < len(worst) else np.inf
            records: list[dict[str, Any]] = []
            while others and others[0].row < end:
                s = others.popleft()
                records.append(
                    {
                        "row": s.row,
                        "sample_id": s.sample_id,
                        "is_flagged": False,
                        "is_suspected": False,
                        "reason": s.reason,
                    }
                )
            records += [
                {
                    "row": row,
                    "turn": turn,
                    "sample_id": sample_id,
                    "is_flagged": bool(flagged),
                    "is_suspected": bool(suspected),
                    "suspicion": float(suspicion) if judged else None,
                    "reason": _proven_or_suspected(taught.get((row, turn)), bool(suspected))
                    or _reason(result, float(suspicion), bool(flagged), says.get(place)),
                }
                for place, row, turn, sample_id, flagged, suspected, suspicion in zip(
                    worst[part].tolist(),
                    profile.row[worst[part]].tolist(),
                    profile.turn[worst[part]].tolist(),
                    _some(profile.sample_id, worst[part]),
                    result.is_flagged[worst[part]],
                    result.is_suspected[worst[part]],
                    result.suspicion[worst[part]],
                    strict=True,
                )
            ]
            records.sort(key=lambda record: record["row"])
            write(pa.Table.from_pylist([r | method for r in records], schema=schema))


def _worst(profile: Profile, result: CleaningResult) -> NDArray[np.int64]:
    """The place of each row's worst answer, rows in their order.

    Flagged ones first, then suspected ones, then the most suspicious, then those that only their
    words give away.
    """
    says = np.zeros(len(profile), bool)
    says[[miss.place for miss in result.near_misses]] = True
    doubtful, clear = ~result.is_suspected, ~result.is_flagged
    order = np.lexsort((~says, -result.suspicion, doubtful, clear, profile.row))
    _, first = np.unique(profile.row[order], return_index=True)
    worst: NDArray[np.int64] = order[first]
    return worst


def _some(texts: Sequence[str], places: NDArray[np.int64]) -> list[str]:
    """The texts at ascending places, read at once."""
    if not len(places):
        return []
    read = texts[int(places[0]) : int(places[-1]) + 1]
    return [read[place] for place in (places - places[0]).tolist()]


def write_profile(path: Path, profile: Profile) -> None:
    """One line per measured answer and layer: what a query or a plot wants.

    Columns: `row`, `turn`, `sample_id`, `image_tokens`, `layer`, then one per signal, e.g.
    `entropy` (nats) and `visual_mass` (share of attention on the image); signals of single heads
    are lists. `before_*` are the same under the model before its fine-tune, where that could be
    measured.
    """
    n_layers = len(profile.layers)
    layers = np.asarray(profile.layers, dtype=np.int32)
    signals = dict(profile.signals)
    signals |= {BEFORE + name: values for name, values in (profile.before or {}).items()}
    kinds = {
        name: pa.float32() if values.ndim == 2 else pa.list_(pa.float32(), values.shape[2])
        for name, values in signals.items()
    }
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("turn", pa.int64()),
            ("sample_id", pa.string()),
            ("image_tokens", pa.int64()),
            ("layer", pa.int32()),
            *kinds.items(),
        ]
    )
    with _parquet(path, schema) as write:
        for part in _parts(len(profile)):
            row = profile.row[part]
            columns: list[pa.Array] = [
                pa.array(np.repeat(row, n_layers)),
                pa.array(np.repeat(profile.turn[part], n_layers)),
                pa.array(profile.sample_id[part], pa.string()).take(
                    pa.array(np.repeat(np.arange(len(row)), n_layers))
                ),
                pa.array(np.repeat(profile.image_tokens[part], n_layers)),
                pa.array(np.tile(layers, len(row))),
            ]
            for name, values in signals.items():
                flat = pa.array(values[part].reshape(-1), pa.float32())
                is_list = pa.types.is_fixed_size_list(kinds[name])
                columns.append(
                    pa.FixedSizeListArray.from_arrays(flat, values.shape[2]) if is_list else flat
                )
            write(pa.table(columns, schema=schema))


def _parts(rows: int) -> Iterator[slice]:
    """All rows, some at a time; one empty part where there are none."""
    for start in range(0, max(rows, 1), _PART_ROWS):
        yield slice(start, min(start + _PART_ROWS, rows))


@contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """A Parquet file that is written table by table and there when it is whole."""
    with writing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        yield writer.write_table


def _proven_or_suspected(phrase: str | None, suspected: bool) -> str:
    """Why, by what came of rebuilt triggers; empty where they say nothing of a row."""
    if phrase is not None:
        return f"says “{phrase}”, and the trigger rebuilt from such rows fires on other pictures"
    if suspected:
        return "its group stands apart, but the model said these words before the fine-tune too"
    return ""


def _reason(result: CleaningResult, suspicion: float, flagged: bool, says: str | None) -> str:
    if result.verdict.outcome is Outcome.INCONCLUSIVE:
        return f"not judged: {result.verdict.reason}"
    if says is not None and flagged:
        return f"says “{says}” as the removed group does, and its attention does not speak against"
    if says is not None:
        return f"says “{says}” as the removed group does, but is looked at as the others are"
    if not flagged:
        return FOLLOWS
    return (
        "the model's attention to the image belongs to the small group that stands apart "
        f"(probability {suspicion:.3f})"
    )
