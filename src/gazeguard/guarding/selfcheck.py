"""A guard proves itself on its model before it judges anybody's request.

transformers changes how `generate` hands its inputs over, and a guard that misses such a change
gives other answers than it should and does not notice. So a short generation is run three ways:
plain, under a guard that flags the second of two prompts, and with what that guard hid taken out by
the model's own attention mask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from gazeguard.errors import GazeguardError, MeasurementError, ModelError
from gazeguard.guarding.saved import Saved
from gazeguard.methods.cleansight.settings import WIDEN, Setting, plan
from gazeguard.models.files import first_line
from gazeguard.models.target import Encoded, ImageTokens, Target
from gazeguard.probe.attention import check_rows
from gazeguard.probe.cache import cache_in
from gazeguard.types import KeyKind, Outcome
from gazeguard.versions import untested

if TYPE_CHECKING:
    from gazeguard.guarding.guard import Guard

# A prompt of words alone, some of which the guard is told are a picture's: it looks at kinds of
# positions, and a picture would cost a hundred times as many.
_KINDS = (KeyKind.TEMPLATE, *[KeyKind.IMAGE] * 3, *[KeyKind.PROMPT] * 2, KeyKind.TEMPLATE)
_STEPS = 2  # the prompt's pass, and one that decodes from the cache
# Largest difference of two ways to compute a logit, in units of the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 5e-2

# The packages that run a model, and so can change what a guard sees of it.
_RUNS = ("accelerate", "peft", "tokenizers", "torch", "transformers")
log = logging.getLogger(__name__)

_proven: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def prove(target: Target) -> None:
    """Refuse a model on which a guard would not do what it promises; once per model and kernel.

    Three generations of two tokens from prompts of seven words, in the decoder's first layers: what
    is checked does not depend on the depth. The model must be idle meanwhile, and is left as it
    was.

    Raises:
        ModelError: an unflagged prompt noticed its neighbour, the flagged one was not answered as
            if the hidden tokens were not there, the cache does not hold prompt plus steps, or none
            of it could be run. Names the versions.
        MeasurementError: the model's numbers are not finite.
    """
    kernel = str(getattr(target.decoder.config, "_attn_implementation", None))
    if _proven.get(target.base) == kernel:
        return
    check_rows(target)
    try:
        with _first_layers(target) as shallow:
            wrong = _what_is_wrong(shallow)
    except GazeguardError:  # says by itself what is wrong
        raise
    except Exception as error:  # whatever a changed library raises, it proves nothing
        wrong = f"it stops with {type(error).__name__} ({first_line(error)})"
    if wrong:
        raise ModelError(
            f"{target.name} cannot be guarded with transformers {transformers.__version__} and"
            f" torch {torch.__version__}, because in the guard's self-check {wrong}: install"
            " versions that `gazeguard doctor` calls tested."
        )
    for sentence in untested(*_RUNS):
        log.warning("%s; the guard's self-check passed on %s.", sentence, target.name)
    _proven[target.base] = kernel


def _what_is_wrong(target: Target) -> str | None:
    """The first promise that does not hold, in words."""
    words = _words(target, len(_KINDS) + _STEPS)
    told = words[-_STEPS:]
    prompts = torch.tensor([words[:-_STEPS], words[-_STEPS - 1 :: -1]])
    real = torch.ones_like(prompts)
    kinds = torch.tensor([_KINDS, _KINDS], dtype=torch.int8)
    images = ((ImageTokens(int((kinds[0] == KeyKind.IMAGE).sum())),),) * 2
    encoded = Encoded({"input_ids": prompts}, kinds, ("unflagged", "flagged"), images)
    plain, _ = _generate(target, told, input_ids=prompts, attention_mask=real)
    if not bool(plain.isfinite().all()):
        raise MeasurementError(
            f"the numbers of {target.name} are not finite (NaN or infinity), so nothing it answers"
            " can be judged: try --dtype float32 or another copy of the model."
        )
    with _flagging_the_second(target).watch(encoded=encoded) as w:
        guarded, held = _generate(target, told, input_ids=prompts, attention_mask=real)
    if [verdict.outcome for verdict in w.verdicts] != [Outcome.CLEAN, Outcome.FLAGGED]:
        return "prompts pass by the guard unseen"
    if held != len(_KINDS) + _STEPS - 1:  # the last word is written and not read
        return f"the cache holds {held} positions instead of {len(_KINDS) + _STEPS - 1}"
    if not torch.equal(guarded[:, 0], plain[:, 0]):
        return "a request that is not flagged gets another answer beside one that is"
    tokens = w.verdicts[1].tokens
    assert tokens is not None, "a flagged verdict says which tokens stand out"
    hidden = kinds[1] == KeyKind.IMAGE
    hidden[hidden.clone()] = torch.from_numpy(tokens[0])
    # Of the other positions the numbers are said: the model would count past the hidden ones.
    places = torch.arange(len(_KINDS))[None]
    without = real[1:].masked_fill(hidden, 0)
    expected, _ = _generate(
        target, told, input_ids=prompts[1:], attention_mask=without, position_ids=places
    )
    off = float((guarded[:, 1] - expected[:, 0]).abs().max() / expected.abs().max())
    if not off <= _TOLERANCE.get(target.base.dtype, _HALF_TOLERANCE):
        return "a flagged request is not answered as if the hidden tokens were not there"
    return None


@contextmanager
def _first_layers(target: Target) -> Iterator[Target]:
    """The target with no more of its decoder than two layers with rows and one of each type."""
    every = getattr(target.decoder, "layers", None)
    types = getattr(target.decoder.config, "layer_types", None) or ()
    firsts = [types.index(one) for one in set(types)]
    depth = max([*target.layers[:2], *firsts]) + 1
    if not isinstance(every, nn.ModuleList) or depth >= len(every):
        yield target
        return
    target.decoder.layers = every[:depth]
    try:
        yield replace(target, layers=tuple(layer for layer in target.layers if layer < depth))
    finally:
        target.decoder.layers = every


class _SecondIsFar:
    """A detector for which the second of two prompts is far away, and calm once looked at alone."""

    def score(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.array([0.0, 1.0] if len(features) == 2 else [0.0] * len(features))


def _flagging_the_second(target: Target) -> Guard:
    """A guard as people use it (it looks again, alone at what it flags), but for its detector."""
    from gazeguard.guarding.guard import Guard

    setting = Setting("all", "log-ratio", "whitened", WIDEN)
    what = plan(setting, target.layers, target.layers)
    arrays = {
        "mean": np.zeros(1),
        "whitener": np.ones(1),
        "calibration": np.zeros(199),
        "levels": np.ones((len(what.layers), 1)),
    }
    guard = Guard(target, Saved(setting, what, arrays, 0.01, 0, {}, {"id": "self-check"}))
    guard.detector = _SecondIsFar()  # type: ignore[assignment]
    return guard


def _generate(target: Target, told: list[int], **inputs: Tensor) -> tuple[Tensor, int | None]:
    """Logits `(step, row, word)` before each of the words that are told, and the cache's length."""
    start = inputs["input_ids"].shape[1]
    if target.family.answer_type:  # else all words of a prompt would see each other
        inputs["token_type_ids"] = torch.full_like(inputs["input_ids"], target.family.answer_type)
    with torch.no_grad():
        out = target.base.generate(
            **{name: value.to(target.device) for name, value in inputs.items()},
            max_new_tokens=len(told),
            num_beams=1,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda row, ids: [told[len(ids) - start]],
        )
    cache = cache_in(out)
    return torch.stack(out.logits).float().cpu(), cache and int(cache.get_seq_length())


def _words(target: Target, count: int) -> list[int]:
    """Ids from all over the vocabulary that are words: no picture and nothing special."""
    tokenizer = target.processor.tokenizer
    added = set(tokenizer.added_tokens_decoder) | {target.image_token_id}
    plain = [i for i in range(min(len(tokenizer), 5000)) if i not in added]
    return [plain[i] for i in np.linspace(0, len(plain) - 1, count).astype(int)]
