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
from gazeguard.models.target import Grid
from gazeguard.probe.hide import run_hiding
from gazeguard.probe.intercept import AttentionCall
from gazeguard.probe.rows import last_real, row
from gazeguard.signals.ratio import visual_prompt_ratio
from gazeguard.types import KeyKind, Outcome

if TYPE_CHECKING:
    from gazeguard.guarding.guard import Guard


class Session:
    """What is known about a batch: kinds of positions, verdicts, tokens that are hidden.

    A look is one run over the prompt. The first one judges. Where tokens are hidden after all is
    known, or are widened until the guard is calm, more looks follow; `again` says so.

    Args:
        guard: judges and picks tokens.
        kind: int8 `(sample, position)` of `KeyKind`.
        grids: of the samples' image tokens, or None each.
        disarm: hide the tokens of flagged samples.
    """

    def __init__(
        self, guard: Guard, kind: Tensor, grids: Sequence[Grid | None], *, disarm: bool
    ) -> None:
        self._guard, self._kind, self._grids, self._disarm = guard, kind, grids, disarm
        self._image = kind == KeyKind.IMAGE
        self._last = last_real(kind)
        self._here: dict[torch.device, tuple[Tensor, ...]] = {}  # the three above, on a device
        self._look = 0
        self._reading = True
        self._ratios: dict[int, Tensor] = {}
        self._evidence: Tensor | None = None
        self._seen: set[int] = set()
        self._restless = torch.zeros(len(kind), dtype=torch.bool)
        self._hidden: Tensor | None = None  # bool (sample, position), on the CPU
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
        more = self._hidden is not None and self._widened()
        if more:
            self._look += 1
            self._seen.clear()
            self._ratios.clear()
            self._evidence = None
        else:
            self._reading = False
        return more

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
            parts = (self._kind, self._image, self._last)
            self._here[device] = tuple(part.to(device) for part in parts)
        kind, image, last = self._here[device]
        weights = row(call, last.repeat_interleave(copies), length)[::copies, :, :length]
        gain = torch.ones(samples, 1)
        if self._hidden is not None and layer >= plan.hide_from:
            weights = _without(weights, self._hidden.to(device)[:, None])
            # A picture with tokens missing gets less attention for that alone.
            left = (self._image & ~self._hidden).sum(1, keepdim=True)
            gain = self._image.sum(1, keepdim=True).clamp_min(1) / left.clamp_min(1)
        if layer in plan.layers:
            log = self._guard.setting.feature == "log-ratio"
            ratio = visual_prompt_ratio(weights[:, None], kind, log=log)[:, 0]
            gain = gain.to(ratio)
            self._ratios[layer] = ratio + gain.log() if log else ratio * gain
        evidence = self._guard.evidence(layer, weights, image)
        if evidence is not None:
            before = self._evidence
            self._evidence = (
                evidence if before is None else torch.maximum(before.to(evidence.device), evidence)
            )
        self._seen.add(layer)
        if self._seen == plan.watched:
            self._conclude()

    def _conclude(self) -> None:
        """All detection layers are read: judge, and pick what to hide next."""
        ratios = [self._ratios[layer].cpu() for layer in self._guard.plan.layers]
        scores = self._guard.detector.score(torch.stack(ratios, 1).double().numpy())
        if self._look:
            # Not a number is no sign of calm.
            restless = torch.from_numpy(~(scores <= self._guard.threshold))
            self._restless = self._restless & restless
            return
        self.verdicts = [self._verdict(i, score) for i, score in enumerate(scores.tolist())]
        flagged = torch.tensor([v.outcome is Outcome.FLAGGED for v in self.verdicts])
        if not bool(flagged.any()):
            return
        self._restless = flagged
        picked = self._pick() & flagged[:, None]
        self._show(picked)
        if self._disarm and bool(picked.any()):
            self._hide(picked)

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

    def _pick(self) -> Tensor:
        """The tokens that stand out in this look, bool `(sample, position)`."""
        assert self._evidence is not None, "evidence is read with the last watched layer"
        evidence = self._evidence.cpu()
        if self._hidden is not None:
            evidence = evidence.masked_fill(self._hidden, 0.0)
        return self._guard.pick(evidence, self._image, self._grids, self._look)

    def _widened(self) -> bool:
        """Hide more after a look, when more is needed; whether to run the prompt again."""
        assert self._hidden is not None, "only called when something is hidden"
        guard = self._guard
        if not guard.widens:
            # In one pass the tokens were hidden as soon as they were known.
            self._reading = False
            return self._look == 0 and not guard.plan.single_pass
        if self._look == 0:
            return True
        if not (self._reading and bool(self._restless.any())):
            return False
        if self._look < guard.looks:
            picked = self._pick()
        else:
            picked, self._reading = self._image, False
        self._hide(self._hidden | (picked & self._restless[:, None]))
        self._show(self._hidden)
        return True

    def _hide(self, hidden: Tensor) -> None:
        self._hidden = hidden
        self._windows.clear()

    def _show(self, tokens: Tensor) -> None:
        """Put picked tokens, and what made them stand out at first, into the verdicts."""
        assert self._evidence is not None, "tokens are picked from evidence"
        for i, verdict in enumerate(self.verdicts):
            if verdict.outcome is not Outcome.FLAGGED:
                continue
            shape = self._grids[i] or (-1,)
            slots = self._image[i]
            heat = verdict.heat
            if heat is None:
                heat = self._evidence[i].cpu()[slots].float().numpy().reshape(shape)
            self.verdicts[i] = replace(
                verdict,
                tokens=tokens[i][slots].numpy().reshape(shape),
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


def _without(weights: Tensor, hidden: Tensor) -> Tensor:
    """Weights `(sample, head, key)` as softmax gives them when some keys are hidden."""
    lost = weights.masked_fill(~hidden, 0.0).sum(-1, keepdim=True)
    left = (1.0 - lost).clamp_min(torch.finfo(weights.dtype).eps)
    return weights.masked_fill(hidden, 0.0) / left
