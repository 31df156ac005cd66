"""Counts of how a data set is read: what a user should see before a model runs for hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from gazeguard.data.images import shorten
from gazeguard.types import SkipKind

MAX_SKIPPED = 0.01  # share of rows that nobody looked at, above which a set is not called clean


def counted(count: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


@dataclass(slots=True)
class Survey:
    """How the rows of a set are read.

    Attributes:
        with_pictures: readable rows with pictures.
        pictures: in these rows.
        turns: in these rows, the user's and the system's too.
        text_only: readable rows without a picture.
        skipped: rows that cannot be used, by cause.
        ignored: columns that nothing is read from, with the number of rows where they hold
            something.
    """

    with_pictures: int = 0
    pictures: int = 0
    turns: int = 0
    text_only: int = 0
    skipped: Counter[SkipKind] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """All of them."""
        return self.with_pictures + self.text_only + self.skipped.total()

    @property
    def is_enough(self) -> bool:
        """Whether a set that is read like this can be called clean."""
        unread = self.skipped.total()
        return self.with_pictures > 0 and unread <= MAX_SKIPPED * (self.with_pictures + unread)

    def complaint(self) -> str:
        """Why it cannot."""
        if not self.with_pictures:
            return "No row has a picture and an answer that can be read: `clean` can judge nothing."
        unread = self.skipped.total()
        share = unread / (self.with_pictures + unread)
        return (
            f"{share:.1%} of the rows that are not of text alone cannot be used: above"
            f" {MAX_SKIPPED:.0%}, `clean` does not call a set clean."
        )

    def read(self, pictures: int, turns: int) -> None:
        """One more readable row."""
        if not pictures:
            self.text_only += 1
            return
        self.with_pictures += 1
        self.pictures += pictures
        self.turns += turns

    def skip(self, kind: SkipKind) -> None:
        """One more row that cannot be used."""
        self.skipped[kind] += 1

    def ignore(self, columns: Iterable[str]) -> None:
        """Columns of one more row that nothing was read from."""
        self.ignored.update(columns)

    def sentence(self) -> str:
        """All counts in one or two lines."""
        text = (
            f"{counted(self.rows, 'row')}: {self.with_pictures:,} with"
            f" {counted(self.pictures, 'picture')} and {counted(self.turns, 'turn')},"
            f" {self.text_only:,} of text alone, {self.skipped.total():,} that cannot be used"
        )
        if self.skipped:
            text += f" ({', '.join(f'{kind} {n:,}' for kind, n in self.skipped.most_common())})"
        if self.ignored:
            text += f". Columns that are not read: {shorten(', '.join(self.ignored), 160)}"
        return text + "."
