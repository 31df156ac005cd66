"""References that the tool makes itself: benign fine-tunes of the base, of the suspect's kind."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gazeguard.errors import UsageError
from gazeguard.models.answers import answer_ids
from gazeguard.models.difference import Difference
from gazeguard.models.target import Target
from gazeguard.scanning.entry import Progress
from gazeguard.scanning.samples import SampleSet
from gazeguard.scanning.store import digest
from gazeguard.scanning.subject import Subject
from gazeguard.tuning import Made, Recipe, kept, make_reference, recipes
from gazeguard.tuning.lesson import own_answers
from gazeguard.tuning.references import suspect_config, whole_model_config
from gazeguard.types import Sample

log = logging.getLogger("gazeguard.scan")

_TUNING_ROWS = 512  # more are not needed for adapters; their pictures are in memory while tuning
_FEWEST_ROWS = 32
_NOTES = (
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "revision",
    "task_type",
)


def cache_folder(out: Path | None) -> Path:
    """Where references are kept: in the output folder, else in the user's cache.

    Raises:
        UsageError: it cannot be written to.
    """
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gazeguard"
    folder = (own if out is None else out) / "references"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder} ({error.strerror}): choose another folder with --out."
        ) from error
    return folder


def tuning_rows(probe: SampleSet, images: Path | None) -> SampleSet:
    """Rows to tune references on: those behind the probed ones, if there are enough.

    A suspect has not learnt the samples that it is probed with, so a reference should not have
    either.
    """
    behind = SampleSet(probe.path, images, _TUNING_ROWS, after=probe.rows[-1])
    if len(behind) >= _FEWEST_ROWS:
        return behind
    log.warning(
        "%s has only %d rows behind the %d samples that are probed, so references are tuned on"
        " those samples too; give %d rows or more to keep the two apart.",
        probe.path,
        len(behind),
        len(probe),
        len(probe) + _FEWEST_ROWS,
    )
    return probe


@dataclass
class ReferenceMaker:
    """Makes `count` references for a suspect, or finds those that an earlier run has made.

    Attributes:
        base: what is tuned.
        count: how many.
        rows: benign rows to tune on; where one has no answer, all answers are the base's own.
        folder: where references are kept, under the hash of all that they depend on.
        steps: of tuning, at most; one that is cut off by it is told of.
        dtype, device: of tuning.
        progress: called with a name, steps done and steps at most.
    """

    base: Subject
    count: int
    rows: SampleSet
    folder: Path
    steps: int
    dtype: str
    device: str
    progress: Progress | None = None
    _answers: list[list[int]] = field(default_factory=list)

    def __call__(self, suspect: Subject, difference: Difference, distance: float) -> list[Subject]:
        """The references of a suspect whose weights moved by `distance`.

        Raises:
            ModelError: nothing of the suspect's kind can be put on the base.
        """
        base: Target | None = self.base.load(self.dtype, self.device)
        assert base is not None
        if suspect.adapter is not None:
            config = suspect_config(suspect.adapter)
        else:
            config = whole_model_config(base, difference.changed, difference.kind == "projector")
        width = int(base.decoder.config.hidden_size)  # type: ignore[union-attr,arg-type]
        plans = recipes(self.count, width, distance)
        places = [self.place(config, plan) for plan in plans]
        made = [kept(out, plan) for out, plan in zip(places, plans, strict=True)]
        missing = [i for i, one in enumerate(made) if not self._enough(one)]
        if missing:
            log.info(
                "Making %d of %d references for %s, whose weights moved %.3g; all are kept in %s.",
                len(missing),
                self.count,
                suspect.name,
                distance,
                self.folder,
            )
        samples = list(self.rows) if missing else []
        for number in missing:
            base = base or self.base.load(self.dtype, self.device)
            made[number] = make_reference(
                base,
                copy.deepcopy(config),
                samples,
                self._taught(base, samples),
                plans[number],
                places[number],
                self.steps,
                partial(self._tell, number, plans[number]),
            )
            base = None  # it carries the adapter now
        self._warn(plans, made)
        return [
            Subject(f"made: reference {i + 1} of {self.count}", self.base.folder, out)
            for i, out in enumerate(places)
        ]

    def place(self, config: Any, plan: Recipe) -> Path:
        """Where a reference is kept: its name is a hash of all that it depends on.

        Steps are not among that: they only cut off what would have gone on in the same way.
        """
        key = digest(
            {
                "base": self.base.hashes,
                "config": _plain(config),
                "rows": self.rows.fingerprint,
                "recipe": asdict(plan),
            }
        )
        return self.folder / key[:32]

    def _enough(self, made: Made | None) -> bool:
        """Whether it need not be made again: more steps would help one that was cut off."""
        return made is not None and (made.reached or made.steps >= self.steps)

    def _tell(self, number: int, plan: Recipe, done: int, far: float) -> None:
        if self.progress is not None:
            name = f"reference {number + 1} of {self.count}"
            self.progress(
                f"{name}, moved {far:.3g} of {plan.distance:.3g}, steps", done, self.steps
            )

    def _warn(self, plans: Sequence[Recipe], made: Sequence[Made | None]) -> None:
        short = [
            one.moved / plan.distance
            for one, plan in zip(made, plans, strict=True)
            if one is not None and not one.reached
        ]
        if short:
            log.warning(
                "%d of %d made references were cut off after %d steps, when they had moved %.0f %%"
                " to %.0f %% of their way: raise --reference-steps.",
                len(short),
                self.count,
                self.steps,
                100 * min(short),
                100 * max(short),
            )

    def _taught(self, base: Target, samples: list[Sample]) -> list[list[int]]:
        if not self._answers:
            if self.rows.answered == len(self.rows):
                self._answers = answer_ids(base, [sample.answer for sample in samples])
            else:
                log.info("Some rows have no answer: references learn the base's own answers.")
                for start in range(0, len(samples), 8):
                    self._answers += own_answers(base, samples[start : start + 8])
        return self._answers


def _plain(config: Any) -> dict[str, Any]:
    """A peft configuration as JSON types, without what does not touch the weights."""
    kept = {k: v for k, v in config.to_dict().items() if k not in _NOTES}
    plain: dict[str, Any] = json.loads(
        json.dumps(kept, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
    return plain
