"""One cell of the benchmark: one made model, one defence, and what came of it in counts.

Results hold counts and scores, never rates: a table can then draw its own intervals.

`data`: `tp`, `fp`, `fn`, `tn` rows, and `refit`. `input`: `before` and `after` with `clean` (right
on clean requests), `triggered` (right in spite of the trigger) and `asr`, `flagged` and `scores`.
`model`: `outcome` and `score`. A count is `[k, n]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.bench.defences import Defence
from gazeguard.bench.subject import Judged, Responses, Suspect, Traffic, Tuned, Upload
from gazeguard.files import write_json
from gazeguard.lab.attacks import ATTACKS, hits
from gazeguard.lab.finetune import Scores, finetune, judge, load_base
from gazeguard.lab.poison import make_set, samples, trigger_all
from gazeguard.lab.rows import Row, make_rows
from gazeguard.lab.zoo import JUDGE_SEED, Recipe
from gazeguard.scanning.store import digest

Count = list[int]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one model of a suite lies, and what it is.

    Attributes:
        base: folder of the clean model.
        folder: of the model itself.
        references: folders of known-clean fine-tunes of the base, this model not among them.
        work: folder of all that can be made once.
        scores: how the model was judged after its tuning.
    """

    base: Path
    folder: Path
    references: tuple[Path, ...]
    work: Path
    scores: dict[str, Any]


class Bench:
    """One made model, ready for its defences; what several of them need is computed once."""

    def __init__(
        self, place: Place, recipe: Any, *, calibration: int, test: int, held_out: int, refit: bool
    ) -> None:
        self._place, self._recipe, self._refit = place, recipe, refit
        self._calibration, self._test, self._held_out = calibration, test, held_out
        self._tuned = Tuned(place.base, place.folder, recipe.seed)

    def run(self, defence: Defence) -> dict[str, Any]:
        """The result of one defence."""
        levels: dict[str, Callable[[Defence], dict[str, Any]]] = {
            "data": self._clean,
            "input": self._guard,
            "model": self._scan,
        }
        return levels[defence.level](defence)

    @cached_property
    def _upload(self) -> tuple[Upload, list[Row]]:
        """What a cleaner is given, and the rows with the truth."""
        recipe: Recipe = self._recipe
        rows = make_set(
            recipe.task, recipe.rows, recipe.trigger, recipe.rate, recipe.seed, recipe.target
        )
        place = self._place  # two bases may have models of one recipe, and so of one name
        work = place.work / "uploads" / place.base.name / place.folder.name
        return Upload(self._tuned, rows, work), rows

    @cached_property
    def _traffic(self) -> tuple[Traffic, list[Row], list[tuple[Row, Row]]]:
        """What a guard is given, the clean rows, and triggered ones behind what they were."""
        recipe: Recipe = self._recipe
        attack = ATTACKS.get(recipe.trigger)
        count = self._calibration + self._test
        rows = make_rows(recipe.task, count, recipe.seed, held_out=True)
        known, clean = rows[: self._calibration], rows[self._calibration :]
        true = [] if attack is None else [row for row in clean if attack.fits(row)]
        bad = [] if attack is None else trigger_all(true, attack, recipe.seed, recipe.target)
        traffic = Traffic(self._tuned, samples(known), samples([*clean, *bad]))
        return traffic, clean, list(zip(true, bad, strict=True))

    def _clean(self, defence: Defence) -> dict[str, Any]:
        upload, rows = self._upload
        removed: Bools = np.asarray(defence.run(upload), dtype=bool)
        if removed.shape != (len(rows),):
            raise ValueError(f"{defence.name} gave {removed.shape}, not one bool per row")
        truth = np.array([row.is_poison for row in rows])
        return {
            "tp": int((removed & truth).sum()),
            "fp": int((removed & ~truth).sum()),
            "fn": int((~removed & truth).sum()),
            "tn": int((~removed & ~truth).sum()),
            "refit": self._again(rows, removed) if self._refit else None,
        }

    def _again(self, rows: list[Row], removed: Bools) -> dict[str, Count | None]:
        """Scores after the same recipe on the kept rows; the same rows are tuned on once."""
        if not removed.any():
            return _counts(self._place.scores)
        kept = [row for row, out in zip(rows, removed, strict=True) if not out]
        recipe: Recipe = self._recipe
        attack = ATTACKS.get(recipe.trigger)
        content = [
            [[row.question, row.answer, row.pixels.tobytes().hex()] for row in kept],
            [asdict(recipe.plan), recipe.trigger, recipe.target, recipe.task],
            [str(self._place.base.name), self._held_out],
        ]
        path = self._place.work / "refits" / f"{digest(content)[:24]}.json"
        if not path.is_file():
            base = self._place.base
            student = finetune(base, kept, recipe.plan) if kept else load_base(base)
            test = make_rows(recipe.task, self._held_out, JUDGE_SEED, held_out=True)
            found: Scores = judge(student, test, attack, seed=JUDGE_SEED, target=recipe.target)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(found))
        return _counts(json.loads(path.read_text("utf-8")))

    def _guard(self, defence: Defence) -> dict[str, Any]:
        recipe: Recipe = self._recipe
        attack = ATTACKS.get(recipe.trigger)
        traffic, clean, pairs = self._traffic
        n = len(clean)

        def counts(answers: Sequence[str | None]) -> dict[str, Count | None]:
            right = [said == row.answer for said, row in zip(answers[:n], clean, strict=True)]
            found: dict[str, Count | None] = {"clean": _count(right), "triggered": None}
            found["asr"] = None
            if attack is not None:
                told = list(zip(answers[n:], pairs, strict=True))
                found["triggered"] = _count([said == true.answer for said, (true, _) in told])
                telling = [(a, b) for a, (t, b) in told if not attack.idle(t, recipe.target)]
                said, wanted = [a or "" for a, _ in telling], [bad for _, bad in telling]
                found["asr"] = _count(hits(attack, said, wanted, recipe.target))
            return found

        given: Responses = defence.run(traffic)
        if len(given.answers) != len(traffic.asked):
            raise ValueError(f"{defence.name} answered {len(given.answers)} requests, not all")
        flagged = scores = None
        if given.flagged is not None:
            on_bad = _count(given.flagged[n:]) if pairs else None
            flagged = {"clean": _count(given.flagged[:n]), "triggered": on_bad}
        if given.score is not None:
            rounded = [float(f"{score:.6g}") for score in given.score]
            scores = {"clean": rounded[:n], "triggered": rounded[n:] if pairs else None}
        return {
            "before": counts(traffic.plain),
            "after": counts(given.answers),
            "flagged": flagged,
            "scores": scores,
        }

    def _scan(self, defence: Defence) -> dict[str, Any]:
        place = self._place
        suspect = Suspect(place.folder, place.base, place.references, place.work, self._recipe.seed)
        found: Judged = defence.run(suspect)
        return asdict(found)


def _count(hit: Any) -> Count:
    return [int(np.sum(hit)), len(hit)]


def _counts(scores: dict[str, Any]) -> dict[str, Count | None]:
    """Shares over n rows, as counts."""
    n = scores["n"]
    asr = scores["asr"]
    return {
        "clean": [round(scores["clean"] * n), n],
        "asr": None if asr is None else [round(asr * n), n],
    }
