"""Answering one batch: one prefill under the guard, then a token at a time for every row.

`generate` runs the model, because it knows the position ids, masks and caches of every family. What
it would do alike for all rows is taken out of its hands: a logits processor chooses each row's
token by the row's own rules and leaves only that one possible, and a stopping criterion ends rows
one by one. The verdicts are there before the first token, so a refused row ends there, without a
second prefill for the others.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gazeguard.guarding.guard import Guard
from gazeguard.guarding.verdict import GuardVerdict
from gazeguard.guarding.watch import Watch
from gazeguard.server.batch import together
from gazeguard.server.errors import ApiError, blocked, unjudged
from gazeguard.server.job import Done, Event, Failed, Job, Judged, Piece
from gazeguard.server.metrics import Metrics
from gazeguard.server.sampling import Chooser
from gazeguard.server.settings import Settings
from gazeguard.server.text import Detokenizer, Stopper
from gazeguard.types import Outcome


class Row:
    """One request's row of a batch.

    Attributes:
        job: the request.
        begun: its verdict is known.
        over: it needs no more tokens.
        tokens: how many it has.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, metrics: Metrics) -> None:
        self.job, self._metrics = job, metrics
        self.begun = self.over = False
        self.tokens = 0
        self._detokenizer = Detokenizer(tokenizer)
        self._stopper = Stopper(job.options.stop)
        self._kept: list[str] = []  # of an answer that is not streamed

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be done for it."""
        return self.over or self.job.cancelled

    def judge(self, verdict: GuardVerdict, settings: Settings) -> None:
        """Take the verdict; the row ends here when the request is refused."""
        self.begun = True
        action = _action(verdict, settings)
        said = verdict.as_json() | {"action": action}
        self._metrics.judged(said)
        reason = verdict.reason
        if settings.tell == "outcome":
            said = {name: said[name] for name in ("outcome", "action", "applicable")}
            reason = "its image looks triggered"
        if action == "blocked":
            self.fail(blocked(reason, said))
        elif action == "refused":
            self.fail(unjudged(verdict.reason, said))
        else:
            self.job.send(Judged(said))

    def add(self, token: int | None, ends: frozenset[int]) -> None:
        """Take the next token; None when the model gave no numbers to choose by."""
        if token is None:
            message = "The model's numbers for this request are not finite (NaN or infinity)."
            self.fail(ApiError(500, "not_finite", message))
            return
        if self.tokens == 0:
            self._metrics.first_token.observe(time.monotonic() - self.job.arrived)
        self.tokens += 1
        if token in ends:
            self._finish("stop")
            return
        self._write(self._detokenizer.add(token))
        if self._stopper.stopped:
            self._finish("stop")
        elif self.tokens >= self.job.options.max_tokens:
            self._finish("length")

    def fail(self, error: ApiError) -> None:
        """End without an answer."""
        self._last(Failed(error))

    def _finish(self, reason: str) -> None:
        if not self._stopper.stopped:
            self._write(self._detokenizer.end())
        if self._stopper.stopped:
            reason = "stop"  # a stop text in what the last token completed
        else:
            self._kept.append(self._stopper.end())
        if text := "".join(self._kept):
            self.job.send(Piece(text))
        self._last(Done(reason, self.tokens))

    def _write(self, piece: str) -> None:
        text = self._stopper.add(piece) if piece else ""
        if text and self.job.stream:
            self.job.send(Piece(text))
        elif text:
            self._kept.append(text)

    def _last(self, event: Event) -> None:
        if not self.over:
            self.over = True
            self._metrics.generated_tokens.inc(self.tokens)
            self.job.send(event)


def _action(verdict: GuardVerdict, settings: Settings) -> str:
    """What a verdict leads to."""
    if verdict.outcome is Outcome.FLAGGED and settings.mode != "detect":
        return "blocked" if settings.mode == "block" else "purified"
    open_ = verdict.outcome is Outcome.INCONCLUSIVE and verdict.applicable
    return "refused" if open_ and settings.on_guard_error == "refuse" else "answered"


def answer(guard: Guard, rows: Sequence[Row], settings: Settings) -> None:
    """Answer a batch; every row gets its events.

    Args:
        guard: of the model that answers.
        rows: of prompts that fit together.
        settings: of the server.
    """
    target = guard.target
    tokenizer = target.processor.tokenizer
    encoded = together([row.job.prompt for row in rows], tokenizer.pad_token_id)
    inputs = {name: value.to(target.device) for name, value in encoded.inputs.items()}
    config, ends = _config(target.base, tokenizer)
    config.max_new_tokens = max(row.job.options.max_tokens for row in rows)
    # Flagged rows of a server that blocks end one by one: `block` would stop the innocent too.
    with guard.watch("purify" if settings.mode == "purify" else "detect", encoded=encoded) as watch:
        target.base.generate(
            **inputs,
            generation_config=config,
            logits_processor=LogitsProcessorList([_Choice(rows, watch, settings, ends)]),
            stopping_criteria=StoppingCriteriaList([_Over(rows)]),
        )


def _config(base: Any, tokenizer: Any) -> tuple[GenerationConfig, frozenset[int]]:
    """How `generate` is to run, and the tokens that end an answer.

    What the model's publisher set apart from sampling, such as a repetition penalty, holds.
    """
    config: GenerationConfig = copy.deepcopy(base.generation_config)
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
    config.temperature = config.top_p = config.top_k = config.max_length = None
    config.prompt_lookup_num_tokens, config.return_dict_in_generate = None, False
    config.use_cache, config.eos_token_id = True, ends
    config.pad_token_id = tokenizer.pad_token_id
    return config, frozenset(ends if isinstance(ends, list) else [ends])


class _Choice(LogitsProcessor):  # type: ignore[misc]  # untyped base
    """Chooses each row's next token and hands it to the row."""

    def __init__(
        self, rows: Sequence[Row], watch: Watch, settings: Settings, ends: frozenset[int]
    ) -> None:
        self._rows, self._watch, self._settings, self._ends = rows, watch, settings, ends
        self._choose = Chooser([row.job.options for row in rows])
        self._judged = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._judged:
            for row, verdict in zip(self._rows, self._watch.verdicts, strict=True):
                row.judge(verdict, self._settings)
            self._judged = True
        tokens = self._choose(scores)
        for row, token in zip(self._rows, tokens, strict=True):
            if not row.finished:
                row.add(token, self._ends)
        only = torch.full_like(scores, -torch.inf)
        column = torch.tensor([[token or 0] for token in tokens], device=scores.device)
        return only.scatter_(1, column, 0.0)


class _Over(StoppingCriteria):  # type: ignore[misc]  # untyped base
    """Ends rows that have their answer, and those nobody waits for."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.tensor([row.finished for row in self._rows], device=input_ids.device)
