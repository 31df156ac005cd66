"""`clean`: from a model and a data set to the files of the output folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from gazeguard._version import __version__
from gazeguard.cleaning.gallery import gallery
from gazeguard.cleaning.heap import keep_freed_memory
from gazeguard.cleaning.linear import fast_linear
from gazeguard.cleaning.measure import NOT_FINITE, NOT_THE_ROWS_FAULT, SIGNALS, measure, profile_of
from gazeguard.cleaning.outputs import prepare_folder, write_outputs
from gazeguard.data.read import open_dataset
from gazeguard.errors import UsageError
from gazeguard.methods.bye import BYE
from gazeguard.methods.bye.detector import abstain
from gazeguard.models.device import chosen_device
from gazeguard.models.fingerprint import fingerprint
from gazeguard.models.load import load
from gazeguard.probe.store import BlockStore, locked
from gazeguard.provenance import attention_backend, provenance
from gazeguard.report.model import CleanReport
from gazeguard.types import CleaningResult, Outcome, Profile, SkippedRow

if TYPE_CHECKING:
    from gazeguard.cleaning.measure import Progress
    from gazeguard.data.dataset import Dataset
    from gazeguard.models.target import Target

log = logging.getLogger(__name__)

Rule = Literal["robust", "paper"]
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
        """`rows`, `kept`, `removed`, `skipped`."""
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
    rule: Rule = "robust",
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    limit: int | None = None,
    resume: bool = True,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    block_rows: int = BLOCK_ROWS,
    progress: Progress | None = None,
) -> CleanOutcome:
    """Find the poisoned rows of a fine-tuning set with the model that was fine-tuned on it.

    Args:
        model: hub id or folder of the fine-tuned model, or of its base when `adapter` is given.
        data: the data set, a file or folder in any format of `docs/formats.md`.
        out: folder for `kept.*`, `removed.*` (the input's own format), `skipped.jsonl`,
            `verdicts.parquet`, `profile.parquet`, `report.html` and, last, `report.json`.
        adapter: LoRA adapter trained on `model`.
        base: what `model` was before a full fine-tune. The robust rule compares the two; with an
            adapter it needs no second model.
        images: folder that image paths in the data are relative to.
        format: of the data; `auto` looks inside.
        rule: which form of BYE decides.
        batch_size: rows per forward pass; lowered by itself when memory runs out. None suits it
            to the device and, on a CPU, to the length of the prompts.
        device: `auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:1`, `mps`, or
            `balanced` to spread the model over all GPUs.
        dtype: `auto` for the checkpoint's own, or e.g. `bfloat16`.
        limit: look only at the first so many rows; the rest is in no output.
        resume: go on from the rows an earlier, unfinished run left in `out`. A changed model,
            data set or option is noticed and starts afresh in any case.
        seed: of the statistics.
        revision: commit, branch or tag of a hub model.
        trust_remote_code: run the model's own Python files.
        block_rows: rows between two saves.
        progress: called with the rows done and the rows in all.

    Returns:
        What was found. `inconclusive` when nothing, or too little, could be measured; then no row
        is removed.

    Raises:
        UsageError, DataError, ModelError: one sentence that says what to change.
        OSError: a file could not be written; what was measured is kept for the next run.

    Source: arXiv:2505.16916 (BYE).
    """
    arguments = {
        name: value for name, value in locals().items() if name not in ("progress", "model", "data")
    }
    if any(number is not None and number < 1 for number in (batch_size, block_rows, limit)):
        raise UsageError("Batch size, block size and limit must be at least 1: give larger ones.")
    if base is not None and adapter is not None:
        raise UsageError("With --adapter the model itself is the base: leave --base out.")
    out = Path(out)
    dataset = open_dataset(
        Path(data), images=None if images is None else Path(images), format=format
    )
    prepare_folder(out, dataset.path)
    device_map, why = chosen_device(device)
    keep_freed_memory()
    with locked(out / WORK), fast_linear():
        log.info("Loading %s.", model if adapter is None else f"{model} with adapter {adapter}")
        target = load(model, adapter, revision, dtype, device_map, trust_remote_code)
        earlier = None
        if base is not None:
            earlier = load(base, None, None, dtype, device_map, trust_remote_code)
            _same_kind(target, earlier)
        log.info(
            "Device %s (%s), %s, attention %s (the model's own choice).",
            target.device,
            why,
            _dtype_reason(target, dtype),
            attention_backend(target),
        )
        record = provenance(target, dataset, arguments=arguments, seed=seed)
        if batch_size is not None:  # a block's last batch need not be a small one
            block_rows = -(-block_rows // batch_size) * batch_size
        identity = _identity(target, record, batch_size, block_rows)
        if earlier is not None:
            record["base"] = fingerprint(earlier)
            identity["base"] = record["base"]["id"]
        store = BlockStore(out / WORK, identity)
        changed = store.begin(resume=resume)
        if changed:
            log.warning(
                "Changed since the last run in %s: %s; starting afresh.", out, ", ".join(changed)
            )
        total = min(dataset.count(), limit or dataset.count())
        table = measure(
            target,
            dataset,
            store,
            base=earlier,
            total=total,
            batch_size=batch_size,
            block_rows=block_rows,
            progress=progress,
        )
        return _conclude(out, target, dataset, table, rule, seed, record)


def _same_kind(target: Target, base: Target) -> None:
    """Both models must read the same tokens and have the same layers."""
    same = (
        type(target.base) is type(base.base)
        and target.layers == base.layers
        and target.image_token_id == base.image_token_id
    )
    if not same:
        raise UsageError(
            f"{base.name} is not what {target.name} was before its fine-tune (another kind of "
            "model or other layers): give its real base, or leave --base out."
        )


def _identity(
    target: Target, record: dict[str, Any], batch_size: int | None, block_rows: int
) -> dict[str, Any]:
    """What measured numbers depend on.

    Rule, seed and limit do not touch them, so those may change without measuring anything again.
    """
    return {
        "model": record["model"]["id"],
        "data": record["data"]["fingerprint"],
        "device": target.device.type,
        "dtype": record["dtype"],
        "attention": record["attention"],
        "batch size": batch_size,
        "block size": block_rows,
        "signals": list(SIGNALS),
        "layers": list(target.layers),
        "gazeguard": __version__,
        "torch": record["packages"].get("torch"),
        "transformers": record["packages"].get("transformers"),
    }


def _conclude(
    out: Path,
    target: Target,
    dataset: Dataset,
    table: pa.Table,
    rule: Rule,
    seed: int,
    record: dict[str, Any],
) -> CleanOutcome:
    """Judge what was measured and write the output folder."""
    profile = profile_of(table, target.layers)
    failed = [
        SkippedRow(entry["row"], entry["reason"], entry["sample_id"])
        for entry in table.select(["row", "reason", "sample_id"]).to_pylist()
        if entry["reason"] is not None
    ]
    log.info("Comparing %d measured rows.", len(profile))
    result = _judge(profile, failed, rule, seed)
    decided = result.verdict.outcome is not Outcome.INCONCLUSIVE
    removed = profile.row[result.is_flagged].tolist() if decided else []
    # Without a verdict nobody may lose a row that can be read.
    skipped = [s for s in failed if decided or s.reason not in NOT_THE_ROWS_FAULT]
    kept = sorted({*range(table.num_rows)} - {*removed} - {s.row for s in skipped})
    log.info("Writing %s.", out)
    shown, typical = gallery(target, dataset, profile, result)
    report = CleanReport(
        result=result,
        rows=profile.row,
        prompts=profile.prompt,
        answers=table.filter(table["reason"].is_null())["answer"].to_pylist(),
        sample_ids=profile.sample_id,
        counts={
            "rows": table.num_rows,
            "kept": len(kept),
            "removed": len(removed),
            "skipped": len(skipped),
        },
        skipped=skipped,
        entropy=profile.entropy,
        layers=profile.layers,
        provenance=record,
        files={},
        gallery=shown,
        typical=typical,
    )
    report = write_outputs(out, dataset, profile, report, kept, removed, failed)
    return CleanOutcome(report=report, profile=profile, folder=out)


def _judge(profile: Profile, failed: list[SkippedRow], rule: Rule, seed: int) -> CleaningResult:
    broken = sum(skip.reason == NOT_FINITE for skip in failed)
    if broken > len(profile):
        why = (
            f"the model's numbers are not finite for {broken:,} of {broken + len(profile):,} rows,"
            " so its weights or its number format are broken: try --dtype float32 or another copy"
        )
        return abstain(profile, rule, why, "not measured")
    if not len(profile):
        why = "no row could be measured: see skipped.jsonl for why"
        return abstain(profile, rule, why, "not measured")
    return BYE(rule=rule, random_state=seed).fit(profile).result_


def _dtype_reason(target: Target, dtype: str) -> str:
    used = str(target.base.dtype).removeprefix("torch.")
    return f"{used} ({'as asked' if dtype != 'auto' else 'as stored, or float32 for a CPU'})"
