"""One batch of prompts, from the first look at it to its last decoding step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gazeguard.errors import ModelError
from gazeguard.guarding.verdict import NO_IMAGE, NO_WORDS, NOT_FINITE, GuardVerdict
from gazeguard.methods.cleansight.looks import Hiding, Look
from gazeguard.models.target import Images, by_image
from gazeguard.probe.hide import run_hiding
from gazeguard.probe.intercept import AttentionCall
from gazeguard.probe.rows import last_real, row
from gazeguard.signals.ratio import mass_selector, ratio_defined, ratio_of_masses
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
        disarm: hide the tokens of flagged samples.
    """

    def __init__(
        self, guard: Guard, kind: Tensor, images: Sequence[Images], *, disarm: bool
    ) -> None:
        self._guard, self._kind, self._images, self._disarm = guard, kind, images, disarm
        self._image = kind == KeyKind.IMAGE
        self._last = last_real(kind)
        self._at_end = bool((self._last == kind.shape[1] - 1).all())
        self._here: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._reading = True
        self._hiding: Hiding | None = None  # once a sample is flagged
        self._settled = True  # no further look can change what is hidden
        self._masses: dict[int, Tensor] = {}  # layer -> (sample, head, 2)
        self._rows: dict[int, Tensor] = {}  # layer -> (sample, head, key), where tokens are picked
        self._seen: set[int] = set()
        self._hidden: Tensor | None = None  # bool (sample, position), on the CPU
        self._began: Tensor | None = None  # the same, when the pass that runs began
        self._windows: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self._past, self._length = 0, kind.shape[1]
        self.length = kind.shape[1]  # of the prompt
        self.verdicts: list[GuardVerdict] = []

    @property
    def hides(self) -> bool:
        """Whether anything is hidden from any sample."""
        return self._hidden is not None

    # The run of the model, in the order in which things happen.

    def starts(self, past: int, length: int) -> None:
        """A forward pass begins: `length` positions after `past` cached ones."""
        self._past, self._length = past, length
        self._began = self._hidden
        self._windows.clear()

    def attends(self, call: AttentionCall) -> Any:
        """Read one attention call of the pass, hide what is to be hidden from it, and run it."""
        if self._reading and call.layer in self._guard.plan.watched - self._seen:
            self._read(call)
        if self._hidden is None or call.layer < self._guard.plan.hide_from:
            return call.run()
        window = self._window(call)
        return call.run() if window is None else run_hiding(call, *window)

    def again(self) -> bool:
        """A pass over the prompt has ended: whether it must be run once more.

        Raises:
            ModelError: a detection layer was not seen.
        """
        unseen = self._guard.plan.watched - self._seen
        if self._reading and unseen:
            raise ModelError(
                f"{self._guard.target.name} computes layer {min(unseen)} without transformers'"
                " attention interface, so it cannot be guarded: use the version of this model in"
                " transformers 5."
            )
        self._seen.clear()
        self._masses.clear()
        self._rows.clear()
        if not self._settled:
            return True
        self._reading = False
        in_time = self._guard.plan.single_pass or self._began is self._hidden
        return self.hides and not in_time

    def distrust(self, samples: Tensor) -> None:
        """Take back the verdict of samples whose next-token logits are not finite."""
        for i in samples.nonzero().flatten().tolist():
            if self.verdicts[i].applicable:
                self.verdicts[i] = self._guard.unjudged(NOT_FINITE)

    # Reading.

    def _read(self, call: AttentionCall) -> None:
        plan, layer = self._guard.plan, call.layer
        samples, length = self._kind.shape
        copies = call.query.shape[0] // samples  # beams and returned sequences share a prompt
        device = call.query.device
        if device not in self._here:
            self._here[device] = (self._last.to(device), mass_selector(self._kind).to(device))
        last, select = self._here[device]
        if copies > 1:
            last = last.repeat_interleave(copies)
        weights = row(call, last, length, at_end=self._at_end)[::copies, :, :length]
        if self._hidden is not None and layer >= plan.hide_from:
            weights = _without(weights, self._hidden.to(device)[:, None])
        # Little is done per layer: what comes after the last one is done for all at once.
        if layer in plan.layers:
            self._masses[layer] = weights @ select
        if layer in plan.pick:
            self._rows[layer] = weights
        self._seen.add(layer)
        if self._seen == plan.watched:
            self._conclude()

    def _conclude(self) -> None:
        """All detection layers are read: judge, or learn what hiding did, and hide what follows."""
        scores = self._guard.detector.score(self._features().double().numpy())
        if self._hiding is not None:
            self._hide(Look(scores, self._evidence()))
            return
        self.verdicts = [self._verdict(i, score) for i, score in enumerate(scores.tolist())]
        flagged = torch.tensor([v.outcome is Outcome.FLAGGED for v in self.verdicts])
        if not bool(flagged.any()):
            return
        look = Look(scores, self._evidence())
        picked = self._guard.pick(look, self._image, self._images)
        self._show(picked, look.evidence)
        if self._disarm:
            self._hiding = self._guard.hiding(look, self._image, self._images, flagged)
            self._hide(None)

    def _features(self) -> Tensor:
        """Ratios of the detection layers, `(sample, layer, head)`, on the CPU."""
        layers = self._guard.plan.layers
        masses = _together([self._masses[layer] for layer in layers])
        log = self._guard.setting.feature == "log-ratio"
        ratio = ratio_of_masses(masses, ratio_defined(self._kind)[:, None, None], log=log)
        if self._hidden is None:
            return ratio
        # A picture with tokens missing gets less attention for that alone.
        left = (self._image & ~self._hidden).sum(1).clamp_min(1)
        gain = (self._image.sum(1).clamp_min(1) / left)[:, None, None]
        missing = torch.tensor([layer >= self._guard.plan.hide_from for layer in layers])
        gain = torch.where(missing[:, None], gain, 1.0)
        return ratio + gain.log() if log else ratio * gain

    def _evidence(self) -> Tensor:
        """How much each key stands out in some picking layer, `(sample, key)`, on the CPU."""
        found = [
            self._guard.evidence(layer, rows, self._image.to(rows.device)).cpu()
            for layer, rows in self._rows.items()
        ]
        return torch.stack(found).amax(0)

    def _verdict(self, i: int, score: float) -> GuardVerdict:
        kinds = self._kind[i]
        if not bool((kinds == KeyKind.IMAGE).any()):
            return self._guard.unjudged(NO_IMAGE, applicable=False)
        if not bool((kinds == KeyKind.PROMPT).any()):
            return self._guard.unjudged(NO_WORDS)
        if not np.isfinite(score):
            return self._guard.unjudged(NOT_FINITE)
        return self._guard.judge(score)

    # Hiding.

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
            self._hidden = tokens
            self._windows.clear()

    def _show(self, tokens: Tensor, evidence: Tensor | None = None) -> None:
        """Put picked tokens, and at first what made tokens stand out, into the verdicts."""
        for i, verdict in enumerate(self.verdicts):
            if verdict.outcome is not Outcome.FLAGGED:
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
                hidden=self._disarm,
            )

    def _window(self, call: AttentionCall) -> tuple[Tensor, Tensor] | None:
        """Batch places of samples with hidden tokens, and which of the call's keys those are."""
        assert self._hidden is not None, "only asked when something is hidden"
        batch, keys = call.key.shape[0], call.key.shape[2]
        # A sliding cache has dropped its oldest keys; a static one has slots beyond the newest.
        first = max(0, self._past + self._length - keys)
        name = (batch, keys, first, call.key.device)
        if name not in self._windows:
            samples = self._hidden.any(1).nonzero().flatten()
            copies = batch // len(self._hidden)
            places = samples[:, None] * copies + torch.arange(copies)
            seen = self._hidden[samples][:, first : first + keys]
            window = torch.zeros(len(samples), keys, dtype=torch.bool)
            window[:, : seen.shape[1]] = seen
            self._windows[name] = (
                places.flatten().to(call.key.device),
                window.repeat_interleave(copies, 0).to(call.key.device),
            )
        places, window = self._windows[name]
        return (places, window) if first < self._hidden.shape[1] else None


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
        self.length = 0
        self.verdicts = [guard.unjudged(reason) for _ in range(samples)]

    @property
    def hides(self) -> bool:
        """As `Session.hides`."""
        return self._earlier is not None and self._earlier.hides

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


def _together(parts: list[Tensor]) -> Tensor:
    """Stacked along axis 1 on the CPU; one transfer where all are on one device."""
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    return torch.stack(parts, 1).cpu()


def _without(weights: Tensor, hidden: Tensor) -> Tensor:
    """Weights `(sample, head, key)` as softmax gives them when some keys are hidden."""
    lost = weights.masked_fill(~hidden, 0.0).sum(-1, keepdim=True)
    left = (1.0 - lost).clamp_min(torch.finfo(weights.dtype).eps)
    return weights.masked_fill(hidden, 0.0) / left
