"""What is answered: a conversation after its last user turn."""

from __future__ import annotations

from dataclasses import dataclass

from gazeguard.types import Sample, Turn


@dataclass(frozen=True, slots=True)
class Conversation(Sample):
    """A sample that is answered after its last turn, not after the first user turns."""

    @property
    def prompt_turns(self) -> tuple[Turn, ...]:
        """All turns; earlier answers are part of the prompt."""
        return self.turns


def asked(sample: Sample) -> Sample:
    """A row of a data set as a request: up to its last user turn, earlier answers included.

    Pictures of earlier turns are the request's too. A row without a later turn stays as it is.
    """
    last = max((i for i, t in enumerate(sample.turns) if t.role == "user"), default=-1)
    turns = sample.turns[: last + 1]
    if len(turns) <= len(sample.prompt_turns):
        return sample
    return Conversation(sample.row, sample.sample_id, sample.images, turns)
