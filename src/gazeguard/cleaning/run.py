"""`clean`: from a model and a data set to the files of the output folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gazeguard._version import __version__
from gazeguard.cleaning.assemble import assemble
from gazeguard.cleaning.gallery import Choice
from gazeguard.cleaning.judge import judge, weigh
from gazeguard.cleaning.measure import SCHEMA
from gazeguard.cleaning.nominate import nominate
from gazeguard.cleaning.outputs import prepare_folder, write_outputs
from gazeguard.cleaning.proof import groups
from gazeguard.cleaning.reader import About, Here, Job, Reader
from gazeguard.cluster import Ray, connected
from gazeguard.data.columns import Columns
from gazeguard.data.dataset import Dataset, described
from gazeguard.data.survey import MAX_SKIPPED
from gazeguard.errors import UsageError
from gazeguard.methods.bye.detector import Rule
from gazeguard.probe.store import BlockStore, Span, locked
from gazeguard.provenance import plain_arguments
from gazeguard.report.model import CleanReport, Proof
from gazeguard.types import CleaningResult, Outcome, Profile, SkipKind, SkippedRow

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Witness = Literal["all", "attention"]
Remove = Literal["proven", "suspected"]
BLOCK_ROWS = 64  # rows measured between two saves: seconds on a GPU, a minute or so on a CPU
WORK = ".work"


@dataclass(frozen=True, slots=True, eq=False)
class CleanOutcome:
    """What `clean` found and wrote.

    Attributes:
        report: all that the reports say; `report.result` is the method's own answer.
        profile: the measurements behind it.
        folder: the output folder; `report.files` are the names in it.
    """

    report: CleanReport
    profile: Profile
    folder: Path

    @property
    def outcome(self) -> Outcome:
        """Clean, flagged or inconclusive."""
        return self.report.result.verdict.outcome

    @property
    def counts(self) -> dict[str, int]:
        """`rows` = `kept` + `removed` + `skipped`; of the kept, `suspected` and `text_only`."""
        return dict(self.report.counts)


def clean(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    images: str | Path | None = None,
    format: str = "auto",
    columns: Columns | None = None,
    rule: Rule = "robust",
    witness: Witness = "all",
    remove: Remove = "proven",
    batch_size: int | Literal["auto"] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    limit: int | None = None,
    max_skipped: float = MAX_SKIPPED,
    resume: bool = True,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    block_rows: int = BLOCK_ROWS,
    store: str | Path | None = None,
    ray: Ray | None = None,
    progress: Progress | None = None,
) -> CleanOutcome:
    """Find the poisoned rows of a fine-tuning set with the model that was fine-tuned on it.

    Args:
        model: hub id or folder of the fine-tuned model, or of its base when `adapter` is given.
        data: the data set, a file or folder in any format of `docs/formats.md`.
        out: folder for `kept.*`, `removed.*`, `skipped.*` (the input's own format),
            `reasons.jsonl`, `verdicts.parquet`, `profile.parquet`, `report.html` and, last,
            `report.json`. Only files of an earlier run are replaced.
        adapter: LoRA adapter trained on `model`.
        base: what `model` was before a full fine-tune. The robust rule compares the two; with an
            adapter it needs no second model.
        images: folder that image paths in the data are relative to.
        format: of the data; `auto` looks inside.
        columns: names of columns and roles, where the data does not use the usual ones.
        rule: which form of BYE decides.
        witness: `all` also rebuilds the triggers of what attention finds, and of other groups of
            rows that may have one, and tries them on other pictures; `attention` asks only where
            the model looks, as the paper's rule does in any case.
        remove: `suspected` also removes rows with evidence that falls short of proof.
        batch_size: rows per forward pass; lowered by itself when memory runs out. None suits it
            to the device and, on a CPU, to the length of the prompts; `auto` tries what is fastest.
        device: `auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:1`, `mps`, or
            `balanced` to spread the model over all GPUs, then main memory, then disk.
        dtype: `auto` for the checkpoint's own, or e.g. `bfloat16`.
        limit: look only at the first so many rows; the rest is in no output.
        max_skipped: largest share of the rows with pictures, 0 to 1, that may be unread or not
            measured for a clean outcome; beyond that it is inconclusive.
        resume: go on from the rows an earlier, unfinished run left in `out`. A changed model,
            data set or option is noticed and starts afresh in any case.
        seed: of the statistics.
        revision: commit, branch or tag of a hub model.
        trust_remote_code: run the model's own Python files.
        block_rows: rows between two saves.
        store: folder for measured rows, a path or any URL that fsspec knows; inside `out` when
            None.
        ray: which cluster measures the rows; this process does when None. Model, data and images
            must be where every worker finds them.
        progress: called with the rows done and the rows in all, first with those that were there.

    Returns:
        What was found. `inconclusive` when nothing, or too little, could be measured; then no row
        is removed. Rows without a picture are kept and not judged.

    Raises:
        UsageError, DataError, ModelError: one sentence that says what to change.
        OSError: a file could not be written; what was measured is kept for the next run.

    Source: arXiv:2505.16916 (BYE).
    """
    arguments = {
        name: value for name, value in locals().items() if name not in ("progress", "model", "data")
    }
    numbers = (block_rows, limit, batch_size if batch_size != "auto" else None)
    if any(number is not None and number < 1 for number in numbers):
        raise UsageError("Batch size, block size and limit must be at least 1: give larger ones.")
    if not 0 <= max_skipped <= 1:
        raise UsageError(f"max_skipped is a share from 0 to 1, not {max_skipped:g}: give another.")
    if base is not None and adapter is not None:
        raise UsageError("With --adapter the model itself is the base: leave --base out.")
    out = Path(out)
    job = Job(
        str(model),
        Path(data),
        None if adapter is None else str(adapter),
        None if base is None else str(base),
        None if images is None else Path(images),
        format,
        device,
        dtype,
        revision,
        trust_remote_code,
        columns,
    )
    dataset = job.open_data()
    prepare_folder(out, dataset)
    if ray is None:  # a worker tells it otherwise: the walk over all rows is one with its hash
        log.info(described(dataset))
    with locked(out / WORK), _reader(job, dataset, ray) as reader:
        about = reader.about()
        for note in about.notes:
            log.info(note)
        record = about.record | {"seed": seed, "arguments": plain_arguments(arguments)}
        blocks = BlockStore(store or out / WORK, _identity(about, batch_size, block_rows))
        changed = blocks.begin(resume=resume)
        if changed:
            log.warning(
                "Changed since the last run in %s: %s; starting afresh.", out, ", ".join(changed)
            )
        at_once = batch_size if batch_size != "auto" else None
        if batch_size == "auto":
            at_once = int(blocks.note("auto", lambda: str(reader.fitting_batch())))
            log.info("Measuring %d rows at once.", at_once)
        if at_once is not None:  # a block's last batch need not be a small one
            block_rows = -(-block_rows // at_once) * at_once
        total = min(dataset.count(), limit or dataset.count())
        spans = [(a, min(a + block_rows, total)) for a in range(0, total, block_rows)]
        _measure(reader, blocks, spans, total, at_once, progress)
        profile, failed, text_only = assemble(
            blocks.tables(spans), about.layers, out / WORK / "profile"
        )
        log.info("Comparing %d measured %s.", len(profile), profile.unit)
        result = judge(profile, failed, rule, seed, max_skipped)
        proofs: list[Proof] = []
        if witness == "all" and rule == "robust" and result.info:  # it could judge at all
            found = groups(profile, result, nominate(profile, dataset, seed), seed)
            log.info("Rebuilding and trying the triggers of %d groups of rows.", len(found))
            proofs = reader.prove(found)
            result = weigh(profile, result, found, proofs, remove_suspected=remove == "suspected")
            proofs = [p for g, p in zip(found, proofs, strict=True) if g.seen or p.proven]
        return _conclude(
            out, reader, dataset, total, profile, failed, text_only, result, proofs, record
        )


@contextmanager
def _reader(job: Job, dataset: Dataset, ray: Ray | None) -> Iterator[Reader]:
    """This process, or workers of a cluster."""
    if ray is None:
        yield Here(job, dataset)
        return
    from gazeguard.cleaning.spread import Spread

    with connected(ray) as workers, Spread(job, workers) as reader:
        yield reader


def _measure(
    reader: Reader,
    store: BlockStore,
    spans: Sequence[Span],
    total: int,
    batch_size: int | None,
    progress: Progress | None,
) -> None:
    """Bring the store up to date; a block is written while the next ones are measured."""
    missing = store.missing(spans)
    done = total - sum(stop - start for start, stop in missing)

    def rows(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    rows(0)
    with ThreadPoolExecutor(1, "gazeguard-write") as writer:
        written: Future[None] | None = None
        for span, block in reader.blocks(missing, batch_size, rows):
            if written is not None:
                written.result()
            written = writer.submit(store.write, *span, block)
        if written is not None:
            written.result()


def _identity(about: About, batch_size: int | str | None, block_rows: int) -> dict[str, Any]:
    """What measured numbers depend on.

    Rule, seed, limit and who reads do not touch them (the last one no more than the order of a
    sum), so those may change without measuring anything again.
    """
    record = about.record
    identity = {
        "model": record["model"]["id"],
        "data": record["data"]["fingerprint"],
        "device": about.device_type,
        "dtype": record["dtype"],
        "attention": record["attention"],
        "batch size": batch_size,
        "block size": block_rows,
        "signals": SCHEMA.names,
        "layers": list(about.layers),
        "gazeguard": __version__,
        "torch": record["packages"].get("torch"),
        "transformers": record["packages"].get("transformers"),
    }
    return identity | ({"base": record["base"]["id"]} if "base" in record else {})


def _conclude(
    out: Path,
    reader: Reader,
    dataset: Dataset,
    total: int,
    profile: Profile,
    failed: list[SkippedRow],
    text_only: NDArray[np.int64],
    result: CleaningResult,
    proofs: list[Proof],
    record: dict[str, Any],
) -> CleanOutcome:
    """Write the output folder."""
    decided = result.verdict.outcome is not Outcome.INCONCLUSIVE
    removed = np.unique(profile.row[result.is_flagged]) if decided else profile.row[:0]
    # Without a verdict nobody may lose a row that can be read.
    skipped = [s for s in failed if decided or s.kind is not SkipKind.MEASUREMENT]
    stays = np.ones(total, bool)
    stays[removed] = False
    stays[[s.row for s in skipped]] = False
    kept = np.flatnonzero(stays)
    choice = Choice.of(profile, result)
    shown, typical = choice.place(reader.gallery(choice.suspicion))
    suspected = np.setdiff1d(profile.row[result.is_suspected], removed)
    log.info("Writing %s.", out)
    report = CleanReport(
        result=result,
        rows=profile.row,
        turns=profile.turn,
        prompts=profile.prompt,
        answers=profile.answer,
        sample_ids=profile.sample_id,
        counts={
            "rows": total,
            "kept": len(kept),
            "removed": len(removed),
            "suspected": len(suspected),
            "skipped": len(skipped),
            "text_only": len(text_only),
        },
        skipped=skipped,
        entropy=profile.entropy,
        layers=profile.layers,
        provenance=record,
        files={},
        gallery=shown,
        typical=typical,
        beyond=dataset.count() - total,
        proofs=proofs,
    )
    report = write_outputs(out, dataset, profile, report, kept, removed, failed, text_only)
    return CleanOutcome(report=report, profile=profile, folder=out)
