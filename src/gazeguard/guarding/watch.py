"""The block inside which a model is guarded."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import Cache

from gazeguard.errors import ModelError, RefusedError, UsageError
from gazeguard.guarding.attach import attached
from gazeguard.guarding.earlier import alone, divergence, take_rows
from gazeguard.guarding.glance import Glance
from gazeguard.guarding.session import Session, Unread
from gazeguard.guarding.verdict import GuardVerdict
from gazeguard.models.recognise import images, recognise
from gazeguard.models.switch import Switch
from gazeguard.models.target import Encoded, Images
from gazeguard.probe.cache import cache_in, cache_of
from gazeguard.probe.intercept import AttentionCall, intercept
from gazeguard.types import Outcome

if TYPE_CHECKING:
    from gazeguard.guarding.guard import Guard

Mode = Literal["purify", "detect", "block"]

EMBEDDED = "the prompt came as embeddings, so its image tokens cannot be told apart"
CONTINUED = "the prompt goes on from a cache whose beginning was read outside of this call"


class _Generation:
    """One `generate` call: what it was given, and the session of its prompt."""

    def __init__(self, samples: int | None, length: int | None, inputs: dict[str, Tensor]) -> None:
        self.samples, self.length, self.inputs = samples, length, inputs
        self.session: Session | Unread | None = None
        self.cache: Any = None

    def owns(self, cache: Any) -> bool:
        """Whether a pass with this cache is a step of the call.

        A logits processor may run the model on a prompt of its own meanwhile.
        """
        return self.session is None or cache is self.cache


class _Local(threading.local):
    """What a watch knows in one thread."""

    def __init__(self) -> None:
        self.generation: _Generation | None = None
        self.session: Session | Unread | None = None  # of the forward pass that runs
        self.glance: Glance | None = None  # that runs instead of a pass of the model
        self.fresh = False  # that pass reads a prompt
        self.aside = False  # a pass of the model before its fine-tune runs
        # Sessions by their cache, for callers that decode without `generate`.
        self.by_cache: WeakKeyDictionary[Cache, Session | Unread] = WeakKeyDictionary()


class Watch(AbstractContextManager["Watch"]):
    """Guards the model's calls inside a `with` block; made by `Guard.watch`.

    All state lives here and ends with the block. `verdicts` has one entry per sample, in the order
    of the batch; a further call adds its own behind those of earlier ones, and `calls` keeps them
    apart. They are there as soon as a prompt was read, before the first token is written.

    Works under `generate` (sampling, beams, several returned sequences, any cache, with or without
    streaming) and under plain forward passes, with a cache to go on from or without. Prompts that
    are read in chunks, or together with guessed tokens (assisted generation), are refused.
    """

    def __init__(
        self, guard: Guard, mode: Mode, encoded: Encoded | None, fail_closed: bool
    ) -> None:
        if mode not in get_args(Mode):
            raise UsageError(f"no mode '{mode}': choose {', '.join(get_args(Mode))}.")
        self.guard, self.mode, self.fail_closed = guard, mode, fail_closed
        self.calls: list[tuple[GuardVerdict, ...]] = []
        self._encoded = encoded
        self._local = _Local()
        self._open: ExitStack | None = None
        self._switch: Switch | None = None

    @property
    def verdicts(self) -> list[GuardVerdict]:
        """One verdict per sample, over all calls so far."""
        return [verdict for call in self.calls for verdict in call]

    def __enter__(self) -> Watch:
        if self._open is not None:
            raise UsageError("this watch is open already: make another with guard.watch().")
        with ExitStack() as stack:
            stack.enter_context(attached(self.guard.target, self))
            if self.guard.divergences is not None:
                self._switch = Switch(self.guard.target)
                stack.callback(self._switch.remove)
            stack.enter_context(self.intercepting())
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._open is not None, "left without being entered"
        self._open.close()
        self._open = None

    # What the model's hooks call.

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """Send the model's attention calls of this thread through the guard."""
        with intercept(self.guard.modules, self.attends):
            yield

    @contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """A `generate` call of this thread; calls may nest."""
        if kwargs.get("assistant_model") is not None:
            raise UsageError(
                "assisted generation reads the prompt together with guessed tokens, so it cannot be"
                " guarded: leave the assistant model out."
            )
        ids = _first(kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1])
        inputs = {name: value for name, value in kwargs.items() if torch.is_tensor(value)}
        known = torch.is_tensor(ids) and ids.ndim == 2
        before = self._local.generation
        self._local.generation = _Generation(
            len(ids) if known else None, ids.shape[1] if known else None, inputs
        )
        try:
            yield
        finally:
            self._local.generation = before

    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pass of the model begins."""
        local, cache = self._local, cache_of(args, kwargs)
        ids = _first(kwargs.get("input_ids"), *args[:1])
        given = _first(ids, kwargs.get("inputs_embeds"))
        if given is None:
            raise UsageError("a guarded call needs input_ids or inputs_embeds: pass one of them.")
        generation = local.generation
        if generation is not None and not generation.owns(cache):
            generation = None
        session = None if generation is None else generation.session
        past = 0
        if cache is not None and (session is None or session.hides):
            past = int(cache.get_seq_length())  # waits for the device when the cache is static
        if generation is None and past:
            session = local.by_cache.get(cache)
        local.fresh = session is None
        if session is None:
            session = self._begin(generation, ids, given, cache if past else None, kwargs)
            if generation is not None:
                generation.session, generation.cache = session, cache
        local.session = session
        session.starts(past, given.shape[1])
        if self._switch is not None:
            copies = len(given) // len(session.verdicts) if session.verdicts else 1
            rows = [one for one in session.earlier for _ in range(copies)]
            self._switch.rows = rows if rows and not local.fresh else None

    def decodes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The decoder inside the model begins."""
        session = self._local.session
        if session is not None and self._local.glance is None:
            session.decodes(None if args else kwargs)

    def attends(self, call: AttentionCall) -> Any:
        """One attention call of the model's decoder."""
        if self._local.aside:
            return call.run()
        session = self._local.glance or self._local.session
        if session is None:
            raise UsageError(
                f"the decoder of {self.guard.target.name} was called without the model around it,"
                " which is not guarded: call the model itself."
            )
        return session.attends(call)

    def after(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> Any:
        """A forward pass has ended; gives the output that the caller gets."""
        local = self._local
        session, fresh = local.session, local.fresh
        local.session = None
        if self._switch is not None:
            self._switch.rows = None
        if session is None or not fresh:
            return output
        logits = getattr(output, "logits", None)
        before: Tensor | None = None
        if logits is None and session.asks_earlier:
            session.compare(np.full(len(session.verdicts), np.nan))
        elif logits is not None and session.asks_earlier:
            other = self._earlier(module, args, kwargs, session.length, use_cache=False)
            before = _next_logits(other, session)
            session.compare(divergence(_next_logits(output, session), before))
        again = session.again()
        if logits is not None:
            session.distrust(~_next_logits(output, session).isfinite().all(-1))
        given = cache_of(args, kwargs)
        while again:
            self._glance(session)
            if given is not None:
                given.reset()  # the pass that has just ended filled it
            local.session = session
            session.starts(0, session.length)
            output = module.forward(*args, **kwargs)
            self._check_length(_first(given, cache_in(output)), session.length)
            again = session.again()
        local.session = None
        if before is not None:
            session.settle(divergence(_next_logits(output, session), before))
        self.calls.append(tuple(session.verdicts))
        self._refuse(session.verdicts)
        cache = _first(given, cache_in(output))
        if any(session.earlier):
            self._hand_over(module, args, kwargs, session, output, cache)
        if cache is not None:
            local.by_cache[cache] = session
        return output

    def _earlier(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        length: int,
        *,
        use_cache: bool,
    ) -> Any:
        """The same pass over the prompt by the model before its fine-tune."""
        assert self._switch is not None, "only asked with the witness"
        options = alone(kwargs, length) | {"use_cache": use_cache}
        self._local.aside = True
        try:
            with self._switch.off(), torch.no_grad():
                return module.forward(*args, **options)
        finally:
            self._local.aside = False

    def _hand_over(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        session: Session | Unread,
        output: Any,
        cache: Cache | None,
    ) -> None:
        """Let the model before the fine-tune answer what only the fine-tuned one would say."""
        copies = len(output.logits) // len(session.verdicts)
        rows = torch.tensor(session.earlier).repeat_interleave(copies)
        before = self._earlier(module, args, kwargs, session.length, use_cache=cache is not None)
        at = rows.to(output.logits.device)
        output.logits = torch.where(at[:, None, None], before.logits, output.logits)
        if cache is not None:
            filled = cache_in(before)
            assert filled is not None, "asked to use one"
            take_rows(cache, filled, rows, session.length)

    def _check_length(self, cache: Cache | None, length: int) -> None:
        """After a further pass the cache must hold the prompt once, or every answer is off.

        Raises:
            ModelError: it holds something else.
        """
        held = length if cache is None else int(cache.get_seq_length())
        if held != length:
            raise ModelError(
                f"after the guard's second look the cache holds {held} positions and the prompt has"
                f" {length}, so with transformers {transformers.__version__} no answer of this call"
                " can be trusted: install versions that `gazeguard doctor` calls tested."
            )

    def _glance(self, session: Session | Unread) -> None:
        """Run the looks that need no pass of the whole model."""
        try:
            for glance in session.glances():
                self._local.glance = glance
                glance.run()
        finally:
            self._local.glance = None

    def _begin(
        self,
        generation: _Generation | None,
        ids: Tensor | None,
        given: Tensor,
        filled: Cache | None,
        kwargs: Mapping[str, Any],
    ) -> Session | Unread:
        """A session for the prompt that this pass reads."""
        guard = self.guard
        rows = samples = len(given)
        inputs: Mapping[str, Any] = kwargs
        if generation is not None:
            inputs = {**generation.inputs, **kwargs}
            if generation.samples and rows % generation.samples == 0:
                samples = generation.samples
        if filled is not None:
            return Unread(guard, samples, CONTINUED, self._local.by_cache.get(filled))
        if ids is None:
            return Unread(guard, samples, EMBEDDED)
        if generation is not None and generation.length not in (None, ids.shape[1]):
            raise UsageError(
                "the prompt is read in parts or together with guessed tokens, so it cannot be"
                " guarded: leave prefill_chunk_size and assisted generation out."
            )
        copies = rows // samples  # beams and returned sequences stand next to each other
        mask = kwargs.get("attention_mask")
        if torch.is_tensor(mask) and mask.shape == ids.shape:
            mask = mask[::copies]
        else:  # `generate` drops a mask of ones, and makes a 4-D one for a static cache
            mask = None if generation is None else generation.inputs.get("attention_mask")
        own = ids[::copies].cpu()
        kind, found = self._kinds(own, mask, inputs)
        return Session(guard, kind, found, own, disarm=self.mode == "purify")

    def _kinds(
        self, ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[Images, ...]]:
        encoded, target = self._encoded, self.guard.target
        if encoded is not None and torch.equal(encoded.inputs["input_ids"].cpu(), ids):
            return encoded.key_kind, encoded.images
        kind = recognise(target, self.guard.frame, ids, mask)
        tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        return kind, images(target, kind, tensors)

    def _refuse(self, verdicts: Sequence[GuardVerdict]) -> None:
        """Stop the call when its mode says so."""
        if self.mode == "block":
            flagged = sum(v.outcome is Outcome.FLAGGED for v in verdicts)
            if flagged:
                raise RefusedError(
                    verdicts,
                    f"{flagged} of {len(verdicts)} requests look triggered, and the guard blocks"
                    " such calls: answer the others in a call of their own.",
                )
        if self.fail_closed:
            open_ = [v for v in verdicts if v.applicable and v.outcome is Outcome.INCONCLUSIVE]
            if open_:
                raise RefusedError(
                    verdicts,
                    f"{len(open_)} of {len(verdicts)} requests could not be judged"
                    f" ({open_[0].reason}), and the guard fails closed: check these requests.",
                )


def _next_logits(output: Any, session: Session | Unread) -> Tensor:
    """Logits `(sample, vocabulary)` behind the prompts; their copies have the same."""
    logits: Tensor = output.logits
    return logits[:: len(logits) // len(session.verdicts), -1]


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)
