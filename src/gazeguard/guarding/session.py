"""One batch of prompts, from the first look at it to its last decoding step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.errors import ModelError
from gazeguard.guarding.curtain import Curtain
from gazeguard.guarding.glance import Glance, part_of
from gazeguard.guarding.reading import Reading
from gazeguard.guarding.verdict import NO_IMAGE, NO_WORDS, NOT_FINITE, GuardVerdict
from gazeguard.methods.cleansight.looks import Hiding, Look
from gazeguard.models.target import Images, by_image
from gazeguard.probe.intercept import AttentionCall
from gazeguard.types import KeyKind, Outcome

if TYPE_CHECKING:
    from gazeguard.guarding.guard import Guard


class Session:
    """What is known about a batch: kinds of positions, verdicts, tokens that are hidden.

    A look is one run over the prompt. The first one judges. More follow where tokens are hidden
    after all is known, or where the guard tries what hiding them does; `again` says so.

    Args:
        guard: judges and picks tokens.
        kind: int8 `(sample, position)` of `KeyKind`.
        images: of each sample.
        ids: int64 `(sample, position)`.
        disarm: hide the tokens of flagged samples.
    """

    def __init__(
        self, guard: Guard, kind: Tensor, images: Sequence[Images], ids: Tensor, *, disarm: bool
    ) -> None:
        self._guard, self._kind, self._images, self._disarm = guard, kind, images, disarm
        self._ids = ids
        self._image = kind == KeyKind.IMAGE
        self._reading: Reading | None = Reading(guard, kind)
        self._inputs: Mapping[str, Any] | None = None  # what the decoder gets for the prompts
        self._flagged = torch.zeros(len(kind), dtype=torch.bool)
        self._hiding: Hiding | None = None  # once a sample is flagged
        self._settled = True  # no further look can change what is hidden
        self._curtain: Curtain | None = None
        self._began: Curtain | None = None  # the one of the pass that runs, when it began
        self._positions = self.length = kind.shape[1]  # of the sequence so far; of the prompt
        self.verdicts: list[GuardVerdict] = []
        self.earlier: list[bool] = []  # samples that the model before the fine-tune answers

    @property
    def hides(self) -> bool:
        """Whether anything is hidden from any sample."""
        return self._curtain is not None

    @property
    def asks_earlier(self) -> bool:
        """Whether what the model would have said before its fine-tune matters to any sample."""
        compares = self._guard.divergences is not None
        return compares and any(verdict.applicable for verdict in self.verdicts)

    def compare(self, divergence: NDArray[np.float64]) -> None:
        """Take in how far the model diverges from what it was, `(sample,)`, nats.

        What attention flags as well is first answered with tokens hidden, see `settle`: that loses
        less of the fine-tune. Else the model before the fine-tune is to answer.
        """
        for i, value in enumerate(divergence.tolist()):
            self.verdicts[i] = self._guard.compare(self.verdicts[i], value)
        self._give_up([v.flagged_by == ("base",) for v in self.verdicts])

    def settle(self, divergence: NDArray[np.float64]) -> None:
        """Take in how far the answers still diverge, with all hidden that is to be hidden."""
        most = self._guard.most_divergent
        assert most is not None, "only asked with the witness"
        calm = divergence <= most  # not so where it is not a number
        self._give_up(["base" in v.flagged_by and not calm[i] for i, v in enumerate(self.verdicts)])

    def _give_up(self, samples: Sequence[bool]) -> None:
        """The model before the fine-tune answers these, where the guard disarms."""
        if not self._disarm or not any(samples):
            return
        before = self.earlier or [False] * len(samples)
        self.earlier = [a or b for a, b in zip(before, samples, strict=True)]
        for i in np.flatnonzero(samples).tolist():
            self.verdicts[i] = replace(self.verdicts[i], earlier=True, hidden=False)
        if self._settled and self._hidden is not None:  # the earlier model sees the whole picture
            left = self._hidden & ~torch.tensor(self.earlier)[:, None]
            self._curtain = Curtain(left, self._guard.plan.hide_from) if left.any() else None

    # The run of the model, in the order in which things happen.

    def starts(self, past: int, length: int) -> None:
        """A forward pass begins: `length` positions after `past` cached ones."""
        self._positions = past + length
        self._began = self._curtain

    def decodes(self, inputs: Mapping[str, Any] | None) -> None:
        """The decoder is about to run on these keyword arguments; None where it got others."""
        if self._reading is not None and self._disarm:
            self._inputs = inputs if inputs and inputs.get("inputs_embeds") is not None else None

    def attends(self, call: AttentionCall) -> Any:
        """Read one attention call of the pass, hide what is to be hidden from it, and run it."""
        if self._reading is not None and self._reading.read(call, self._hidden):
            self._conclude(self._reading)
        return call.run() if self._curtain is None else self._curtain.run(call, self._positions)

    def again(self) -> bool:
        """A pass over the prompt has ended: whether it must be run once more.

        Raises:
            ModelError: a detection layer was not seen.
        """
        if self._reading is not None:
            if self._reading.unseen:
                raise ModelError(
                    f"{self._guard.target.name} computes layer {min(self._reading.unseen)} without"
                    " transformers' attention interface, so it cannot be guarded: use the version"
                    " of this model in transformers 5."
                )
            self._reading.clear()
        if not self._settled:
            return True
        self._reading = self._inputs = None
        in_time = self._guard.plan.single_pass or self._began is self._curtain
        return self.hides and not in_time

    def glances(self) -> Iterator[Glance]:
        """Further looks, of the flagged samples alone; the caller runs each before the next.

        None where the decoder's inputs cannot be taken apart: then whole passes look.
        """
        samples = self._flagged.nonzero().flatten()
        while not self._settled and self._inputs is not None and self._hidden is not None:
            batch = len(self._inputs["inputs_embeds"])
            copies = batch // len(self._kind)
            inputs = part_of(self._inputs, samples * copies, batch, self.length)
            if inputs is None:
                return
            hidden = self._hidden[samples]
            glance = Glance(self._guard, self._kind[samples], hidden, inputs)
            yield glance
            scores = np.full(len(self._kind), np.nan)
            scores[samples.numpy()] = glance.reading.scores(hidden)
            evidence = torch.zeros(self._kind.shape)
            evidence[samples] = glance.reading.evidence().float()
            self._hide(Look(scores, evidence))
        if self._settled:
            self._reading = self._inputs = None

    def distrust(self, samples: Tensor) -> None:
        """Take back the verdict of samples whose next-token logits are not finite."""
        for i in samples.nonzero().flatten().tolist():
            if self.verdicts[i].applicable:
                self.verdicts[i] = self._guard.unjudged(NOT_FINITE)

    # Judging.

    def _conclude(self, reading: Reading) -> None:
        """All detection layers are read: judge, or learn what hiding did, and hide what follows."""
        scores = reading.scores(self._hidden)
        if self._hiding is not None:
            self._hide(Look(scores, reading.evidence()))
            return
        self.verdicts = [self._verdict(i, score) for i, score in enumerate(scores.tolist())]
        self._flagged = torch.tensor([v.outcome is Outcome.FLAGGED for v in self.verdicts])
        if not bool(self._flagged.any()):
            return
        look = Look(scores, reading.evidence())
        picked = self._guard.pick(look, self._image, self._images)
        self._show(picked, look.evidence)
        if self._disarm:
            self._hiding = self._guard.hiding(look, self._image, self._images, self._flagged)
            self._hide(None)

    def _verdict(self, i: int, score: float) -> GuardVerdict:
        kinds = self._kind[i]
        if not bool((kinds == KeyKind.IMAGE).any()):
            return self._guard.unjudged(NO_IMAGE, applicable=False)
        if not bool((kinds == KeyKind.PROMPT).any()):
            return self._guard.unjudged(NO_WORDS)
        if not np.isfinite(score):
            return self._guard.unjudged(NOT_FINITE)
        return self._guard.judge(score, self._guard.why_unlike(self._ids[i], kinds))

    # Hiding.

    @property
    def _hidden(self) -> Tensor | None:
        """Bool `(sample, position)`, on the CPU."""
        return None if self._curtain is None else self._curtain.hidden

    def _hide(self, look: Look | None) -> None:
        """Tell the pruning rule what the last look showed, and hide what it says."""
        assert self._hiding is not None, "only called when something is flagged"
        try:
            tokens = next(self._hiding) if look is None else self._hiding.send(look)
            self._settled = False
        except StopIteration as end:
            tokens, self._settled = end.value, True
            self._show(tokens)
        if bool(tokens.any()) and (self._hidden is None or not torch.equal(tokens, self._hidden)):
            self._curtain = Curtain(tokens, self._guard.plan.hide_from)

    def _show(self, tokens: Tensor, evidence: Tensor | None = None) -> None:
        """Put picked tokens, and at first what made tokens stand out, into the verdicts."""
        for i, verdict in enumerate(self.verdicts):
            if not bool(self._flagged[i]):
                continue
            slots, images = self._image[i], self._images[i]
            heat = verdict.heat
            if evidence is not None:
                parts = by_image(evidence[i][slots].float(), images)
                heat = tuple(part.numpy() for part in parts)
            self.verdicts[i] = replace(
                verdict,
                tokens=tuple(part.numpy() for part in by_image(tokens[i][slots], images)),
                heat=heat,
                hidden=self._disarm and not verdict.earlier,
            )


class Unread:
    """A batch that cannot be judged, because its prompt does not pass by.

    Args:
        guard: whose verdict is "inconclusive".
        samples: in the batch.
        reason: why it cannot be judged.
        earlier: the session whose cache is gone on from; what it hides stays hidden.
    """

    def __init__(
        self, guard: Guard, samples: int, reason: str, earlier: Session | Unread | None = None
    ) -> None:
        self._earlier = earlier
        self.earlier: list[bool] = [] if earlier is None else earlier.earlier
        self.asks_earlier = False
        self.length = 0
        self.verdicts = [guard.unjudged(reason) for _ in range(samples)]

    @property
    def hides(self) -> bool:
        """As `Session.hides`."""
        return self._earlier is not None and self._earlier.hides

    def decodes(self, inputs: Mapping[str, Any] | None) -> None:
        """Nothing more is looked at."""

    def glances(self) -> Iterator[Glance]:
        """None."""
        return iter(())

    def starts(self, past: int, length: int) -> None:
        """As `Session.starts`."""
        if self._earlier is not None:
            self._earlier.starts(past, length)

    def attends(self, call: AttentionCall) -> Any:
        """As `Session.attends`, reading nothing."""
        return call.run() if self._earlier is None else self._earlier.attends(call)

    def again(self) -> bool:
        """One pass is enough for what cannot be read."""
        return False

    def distrust(self, samples: Tensor) -> None:
        """There is no verdict to take back."""

    def compare(self, divergence: NDArray[np.float64]) -> None:
        """There is no verdict to add to."""

    def settle(self, divergence: NDArray[np.float64]) -> None:
        """Nothing is hidden."""
