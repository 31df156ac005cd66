"""What the writers of this package need to know about one `gazeguard clean` run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.report import words
from gazeguard.types import CleaningResult, NearMiss, Outcome, SkippedRow

if TYPE_CHECKING:
    from PIL.Image import Image

    from gazeguard.methods.rebuild import Firing, Form, Taught

# Given up to 50 row numbers, the first pictures of those rows that have one.
Thumbnails = Callable[[Sequence[int]], Mapping[int, "Picture"]]

Answer = tuple[int, int]
"""A row's number, and which of its answers it is, from 1."""

NO_PICTURE = "no picture, not judged"
COUNT_NAMES = ("rows", "kept", "removed", "suspected", "skipped", "text_only")


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One image of a row with the attention that it got.

    Attributes:
        image: as it was read; writers scale it down themselves.
        heat: decoder layer -> attention over the image grid, `(grid rows, grid columns)`, in any
            non-negative scale that all images of a row share; None when it was not kept.
        name: its file, or its place in the row; empty when it has none.
    """

    image: Image
    heat: Mapping[int, NDArray[np.floating[Any]]] | None = None
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class GalleryItem:
    """One row, or one of its answers, shown large.

    Attributes:
        row: 0-based place in the input.
        turn: which of the row's answers it is, from 1; None for the only one.
        sample_id: content hash of the row.
        prompt: the user's words before the answer.
        answer: the answer in the data set.
        suspicion: in [0, 1].
        pictures: the images of its prompt, in prompt order.
    """

    row: int
    turn: int | None
    sample_id: str
    prompt: str
    answer: str
    suspicion: float
    pictures: tuple[Picture, ...]

    @property
    def key(self) -> str:
        """Tells it from the others on a page."""
        return f"{self.row}" if self.turn is None else f"{self.row}.{self.turn}"


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One other picture of the set, without and with a rebuilt trigger.

    Attributes:
        row: 0-based place in the input.
        prompt: the user's words.
        untouched, triggered: the picture.
        said, said_triggered: the model's answers to the two.
        said_before: the answer with the trigger before the fine-tune; None without that model.
    """

    row: int
    prompt: str
    untouched: Image
    triggered: Image
    said: str
    said_triggered: str
    said_before: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """What came of rebuilding the trigger of a group.

    Attributes:
        phrase: the words that the group's answers share.
        not_tried: why nothing could be tried, or was worth it; empty where it was.
        form: how the trigger was put onto pictures; None where it is words alone.
        words: what was put into the questions; empty where it is in pictures alone.
        trigger: the picture's part by itself.
        firing: how often the model said the words.
        trials: some of the pictures that it was tried on.
        taught: how often the group's own rows get these words, now and before.
        rows: answers that teach the trigger, where it is proven.
    """

    phrase: str
    not_tried: str
    form: Form | None = None
    words: str = ""
    trigger: Image | None = None
    firing: Firing | None = None
    trials: tuple[Trial, ...] = ()
    taught: Taught | None = None
    rows: tuple[Answer, ...] = ()

    @property
    def proven(self) -> bool:
        """Whether the trigger fires on other pictures, and nothing else explains it."""
        return self.firing is not None and self.firing.proven

    @property
    def sentence(self) -> str:
        """What was found, with its counts."""
        if self.firing is None:
            return f"The trigger for “{self.phrase}” was not rebuilt: {self.not_tried}."
        found, (low, high) = self.firing, self.firing.interval
        before = (
            "the model before the fine-tune was not there to compare with"
            if found.before is None
            else f"before the fine-tune the trigger brings them for {found.before}"
        )
        start = "The rebuilt trigger fires" if self.proven else "No trigger could be rebuilt"
        return (
            f"{start}: on {found.n} other pictures the model says “{self.phrase}” for"
            f" {found.triggered} with it (95 % interval {100 * low:.0f} to {100 * high:.0f} %) and"
            f" {found.untouched} without; {before}."
        )


@dataclass(frozen=True, slots=True, eq=False)
class CleanReport:
    """Everything a report of a cleaned data set says.

    Attributes:
        result: the method's answer; its arrays are aligned with `rows`.
        rows: int64 `(N,)`, 0-based input rows that were measured; rows with several answers
            stand there once for each, one after the other.
        turns: int64 `(N,)`, which of its row's answers each is, from 1.
        prompts: `N` user prompts.
        answers: `N` answers.
        sample_ids: `N` content hashes.
        counts: `rows`, `kept`, `removed` and `skipped`, of which the last three add up to the
            first; of the kept, `suspected` and `text_only`: those have no picture, and are not
            judged.
        skipped: rows that could not be read or measured.
        entropy: float32 `(N, L)`, nats.
        layers: `L` decoder layer indices.
        provenance: what was run on what.
        files: what a file holds -> its path, for the files written next to the report.
        gallery: the most suspicious rows, worst first.
        typical: a row from the middle of the kept ones, to compare with.
        beyond: rows after the limit that was asked for: not looked at, and in no file.
        proofs: of groups that attention found, and of others whose trigger fires.
    """

    result: CleaningResult
    rows: NDArray[np.int64]
    turns: NDArray[np.int64]
    prompts: Sequence[str]
    answers: Sequence[str]
    sample_ids: Sequence[str]
    counts: Mapping[str, int]
    skipped: list[SkippedRow]
    entropy: NDArray[np.float32]
    layers: tuple[int, ...]
    provenance: Mapping[str, Any]
    files: Mapping[str, str]
    gallery: list[GalleryItem]
    typical: GalleryItem | None = None
    beyond: int = 0
    proofs: Sequence[Proof] = ()

    def __post_init__(self) -> None:
        n = len(self.rows)
        lengths = {
            "turns": len(self.turns),
            "prompts": len(self.prompts),
            "answers": len(self.answers),
            "sample_ids": len(self.sample_ids),
            "suspicion": len(self.result.suspicion),
            "is_flagged": len(self.result.is_flagged),
            "score": len(self.result.score),
        }
        uneven = {name: length for name, length in lengths.items() if length != n}
        if uneven:
            raise ValueError(f"a report of {n} measured rows got arrays of other lengths: {uneven}")
        if self.entropy.shape != (n, len(self.layers)):
            raise ValueError(f"entropy is {self.entropy.shape}, not {(n, len(self.layers))}")
        if set(self.counts) != set(COUNT_NAMES):
            raise ValueError(f"counts must be {COUNT_NAMES}, not {tuple(self.counts)}")
        total, kept, removed, suspected, skipped, text_only = (self.counts[n] for n in COUNT_NAMES)
        if kept + removed + skipped != total or text_only + suspected > kept:
            raise ValueError(f"counts do not add up: {dict(self.counts)}")

    def turn(self, place: int) -> int | None:
        """Which of its row's answers an entry is; None where it is the only one."""
        turn, same = int(self.turns[place]), self.rows[max(0, place - 1) : place + 2]
        return turn if turn > 1 or int((same == self.rows[place]).sum()) > 1 else None

    def name(self, place: int) -> str:
        """`12`, or `12, turn 2` in a conversation with several answers."""
        return words.row_name(int(self.rows[place]), self.turn(place))


def causes(skipped: Sequence[SkippedRow]) -> dict[str, int]:
    """Cause -> rows, the most frequent first."""
    return dict(Counter(skip.kind.value for skip in skipped).most_common())


def not_looked_at(skipped: Sequence[SkippedRow], pictures: int) -> str:
    """How many of the rows with pictures were not looked at, and why."""
    why = ", ".join(f"{cause}: {n:,}" for cause, n in causes(skipped).items())
    were = "was" if len(skipped) == 1 else "were"
    return f"{len(skipped):,} of {pictures:,} rows with pictures {were} not looked at ({why})"


def headline(report: CleanReport) -> str:
    """The verdict as one plain sentence, without its full stop."""
    said = [_verdict(report)]
    if report.skipped and report.result.verdict.outcome is not Outcome.INCONCLUSIVE:
        pictures = report.counts["rows"] - report.counts["text_only"]
        said.append(not_looked_at(report.skipped, pictures))
    if report.beyond:
        rows = words.plural(report.beyond, "row")
        said.append(f"{rows} after the limit not looked at and in no file")
    return "; ".join(said)


def _verdict(report: CleanReport) -> str:
    outcome, counts = report.result.verdict.outcome, report.counts
    total, removed, suspected = counts["rows"], counts["removed"], counts["suspected"]
    if outcome is Outcome.INCONCLUSIVE:
        return f"Could not decide: {report.result.verdict.reason.rstrip('.')}"
    if outcome is Outcome.CLEAN:
        if not removed:
            return "No sign of poisoning: nothing was removed"
        stand = "stands out and was" if removed == 1 else "stand out and were"
        return f"No clear sign of poisoning: {removed:,} of {total:,} rows {stand} removed"
    if removed:
        look = "looks poisoned and was" if removed == 1 else "look poisoned and were"
        more = f"; {words.plural(suspected, 'kept row')} suspected" if suspected else ""
        return f"{removed:,} of {total:,} rows {look} removed{more}"
    if suspected:
        are = "row is" if suspected == 1 else "rows are"
        return f"{suspected:,} of {total:,} {are} suspected and kept: nothing was removed"
    found = len(np.unique(report.rows[report.result.is_flagged]))
    look = "looks" if found == 1 else "look"
    return f"{found:,} of {total:,} rows {look} poisoned; nothing was removed"


def near_misses(report: CleanReport, *, removed: bool) -> list[NearMiss]:
    """Rows with the words of a removed group, those that went with it or those that were kept."""
    flagged = report.result.is_flagged
    return [miss for miss in report.result.near_misses if bool(flagged[miss.place]) == removed]


def answer_groups(report: CleanReport) -> list[dict[str, Any]]:
    """Groups of rows whose answers share words, those that were removed first; of `robust`."""
    info = report.result.info
    removed = [group | {"passed": True} for group in info.get("groups", ())]
    phrases = {group["phrase"] for group in removed}
    others = [
        group | {"passed": False}
        for group in info.get("next_best", ())
        if group["phrase"] not in phrases
    ]
    return removed + others


def explanation(report: CleanReport) -> str:
    """The verdict's reason without what the headline has already said; empty if nothing is left."""
    verdict = report.result.verdict
    if verdict.outcome is Outcome.INCONCLUSIVE:
        return ""
    claim, colon, why = verdict.reason.partition(": ")
    already_said = claim == "No sign of poisoning" or claim.endswith(
        (" look poisoned", " looks poisoned", " are suspected")
    )
    if not colon or not already_said:
        return verdict.reason
    return why[:1].upper() + why[1:]


def selected_layers(report: CleanReport) -> list[int]:
    """Decoder layers whose attention the verdict rests on."""
    return [stat.layer for stat in report.result.layer_stats if stat.selected]


@dataclass(frozen=True, slots=True)
class Threshold:
    """A number a decision rests on, and where it comes from."""

    value: float | None
    source: str


def thresholds(report: CleanReport) -> dict[str, Threshold]:
    """Every threshold by name: `suspicion` always, and those a method puts in its info.

    A method says so with `info["<name>_threshold"]` and `info["<name>_threshold_source"]`,
    e.g. `bsi_threshold`.
    """
    verdict = report.result.verdict
    found = {"suspicion": Threshold(verdict.threshold, verdict.threshold_source)}
    for key, value in report.result.info.items():
        name = key.removesuffix("_threshold")
        if name != key and name and isinstance(value, int | float):
            source = report.result.info.get(f"{key}_source", "")
            found[name] = Threshold(float(value), str(source))
    return found
