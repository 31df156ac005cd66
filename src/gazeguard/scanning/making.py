"""References that the tool makes itself: benign fine-tunes of the base, of the suspect's kind."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gazeguard.errors import UsageError
from gazeguard.models.difference import Difference
from gazeguard.models.target import Target
from gazeguard.scanning.entry import Progress, steps_of
from gazeguard.scanning.samples import SampleSet
from gazeguard.scanning.store import digest
from gazeguard.scanning.subject import Subject
from gazeguard.tuning import make_reference, recipes
from gazeguard.tuning.lesson import answer_ids, own_answers
from gazeguard.tuning.references import moved, suspect_config, whole_model_config
from gazeguard.types import Sample

log = logging.getLogger("gazeguard.scan")

_TUNING_ROWS = 512  # more are not needed for adapters; their pictures are in memory while tuning
_FEWEST_ROWS = 32
_SAME_DISTANCE = 1.5  # suspects whose weights moved alike, up to this factor, share references
_NOTES = ("base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping", "revision")


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
        steps: of tuning, at most.
        dtype, device: of tuning.
        progress: called with a name, steps done and steps in all.
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
    _distances: dict[str, float] = field(default_factory=dict)

    def __call__(self, suspect: Subject, difference: Difference) -> list[Subject]:
        """The references of a suspect.

        Raises:
            ModelError: nothing of the suspect's kind can be put on the base.
        """
        base: Target | None = self.base.load(self.dtype, self.device)
        assert base is not None
        distance = None
        if suspect.adapter is not None:
            config = suspect_config(suspect.adapter)
            distance = self._distance(suspect)
        else:
            config = whole_model_config(base, difference.changed, difference.kind == "projector")
        width = int(base.decoder.config.hidden_size)  # type: ignore[union-attr,arg-type]
        plans = recipes(self.count, width, steps=self.steps, distance=distance)
        found: list[Subject] = []
        samples: list[Sample] = []
        for number, plan in enumerate(plans):
            key = digest(
                {
                    "base": self.base.hashes,
                    "config": _plain(config),
                    "rows": self.rows.fingerprint,
                    "recipe": asdict(plan),
                }
            )
            out = self.folder / key[:32]
            name = f"reference {number + 1} of {self.count}"
            if not out.is_dir():
                base = base or self.base.load(self.dtype, self.device)
                samples = samples or list(self.rows)
                answers = self._taught(base, samples)
                log.info("Making %s (%d steps at most).", name, plan.steps)
                fresh = copy.deepcopy(config)
                make_reference(
                    base, fresh, samples, answers, plan, out, steps_of(name, self.progress)
                )
                base = None  # it carries the adapter now
            found.append(Subject(f"made: {name}", self.base.folder, out))
        return found

    def _distance(self, suspect: Subject) -> float:
        """How far the suspect's weights moved, rounded so that alike suspects share references."""
        key = digest(suspect.hashes)
        if key not in self._distances:
            far = moved(suspect.load(self.dtype, self.device).model)
            rounded = _SAME_DISTANCE ** round(math.log(far, _SAME_DISTANCE)) if far > 0 else 0.0
            self._distances[key] = float(f"{rounded:.4g}")
        return self._distances[key]

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
