"""A guarded model as its users call it: modes, threads, caches, streams, what it cannot judge."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
)

from gazeguard.errors import RefusedError, UsageError
from gazeguard.guarding.answer import answer
from gazeguard.guarding.attach import _attachments
from gazeguard.methods.cleansight.settings import Setting
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.probe.attention import attend
from gazeguard.probe.intercept import handler_of
from gazeguard.types import Outcome
from tests.contract.guards import CACHE, mask_edited, rigged, sample, steps

CLEAN, FLAGGED, INCONCLUSIVE = Outcome.CLEAN, Outcome.FLAGGED, Outcome.INCONCLUSIVE
ONE_PASS = Setting((1,), "ratio", "whitened", 0.05)
WIDEN = Setting("all", "log-ratio", "whitened", "widen")
both_ways = pytest.mark.parametrize("setting", [ONE_PASS, WIDEN], ids=["one-pass", "widen"])


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(target: Target):
    yield
    assert "generate" not in target.base.__dict__
    assert not target.base._forward_pre_hooks
    assert not target.base._forward_hooks
    assert handler_of(next(iter(target.attention_modules))) is None
    assert target.base not in _attachments


def outcomes(w) -> list[Outcome]:
    return [verdict.outcome for verdict in w.verdicts]


@both_ways
def test_modes(target, encoded, setting):
    guard = rigged(target, encoded, {1}, setting)
    _, plain = steps(target, encoded.inputs)
    with guard.watch("detect") as w:
        _, logits = steps(target, encoded.inputs)
    assert outcomes(w) == [CLEAN, FLAGGED, CLEAN]
    assert torch.equal(logits, plain), "detect changes nothing"
    assert w.verdicts[1].tokens[0].any()
    assert not w.verdicts[1].hidden
    with guard.watch("purify") as w:
        _, logits = steps(target, encoded.inputs)
    assert w.verdicts[1].hidden
    assert not torch.equal(logits[:, 1], plain[:, 1])
    written = []
    watching = target.base.lm_head.register_forward_hook(lambda *_: written.append(1))
    with guard.watch("block") as w, pytest.raises(RefusedError, match="1 of 3") as refused:
        steps(target, encoded.inputs)
    watching.remove()
    assert len(written) == 1, "generation went on after the prompt"
    assert [v.outcome for v in refused.value.verdicts] == outcomes(w) == [CLEAN, FLAGGED, CLEAN]
    innocent = target.encode([sample(0), sample(2, "shapes and sizes?")])
    with guard.watch("block"):
        steps(target, innocent.inputs)
    with pytest.raises(UsageError, match="purify, detect, block"):
        guard.watch("allow")  # type: ignore[arg-type]


def test_verdicts_are_scored_and_explained(target, encoded):
    guard = rigged(target, encoded, {1}, WIDEN)
    with guard.watch() as w, torch.no_grad():
        target.model(**encoded.inputs)
    for verdict, flagged in zip(w.verdicts, (False, True, False), strict=True):
        assert (verdict.score > verdict.threshold) == flagged
        assert (verdict.p_value <= guard.alpha) == flagged
        assert (verdict.verdict.suspicion >= verdict.verdict.threshold) == flagged
        assert (verdict.tokens is not None) == flagged
        assert verdict.reason
    (tokens,), (heat,) = w.verdicts[1].tokens, w.verdicts[1].heat
    assert tokens.shape == heat.shape == (2, 2)
    assert np.isfinite(heat).all()
    shown = w.verdicts[1].as_json()
    places = np.flatnonzero(tokens).tolist()
    assert shown["images"] == [{"grid": [2, 2], "image_tokens": 4, "tokens": places}]
    assert w.verdicts[0].as_json()["images"] is None


@both_ways
def test_calls_in_one_watch_append_and_do_not_touch_each_other(target, encoded, setting):
    """The second call has as many samples, but its hidden tokens are its own."""
    guard = rigged(target, encoded, {1}, setting)
    other = target.encode([sample(0), sample(2, "shapes and sizes?"), sample(1, "colour?")])
    _, plain = steps(target, other.inputs)
    with guard.watch() as w:
        steps(target, encoded.inputs)
        assert outcomes(w) == [CLEAN, FLAGGED, CLEAN]
        _, logits = steps(target, other.inputs)
    assert outcomes(w)[3:] == [CLEAN, CLEAN, FLAGGED]
    assert [len(call) for call in w.calls] == [3, 3]
    assert torch.equal(logits[:, :2], plain[:, :2])
    with guard.watch() as again:
        assert not again.verdicts, "a new watch starts empty"
    with pytest.raises(UsageError, match="another"), again, again:
        pass


@both_ways
def test_after_the_block_the_model_is_as_before(target, encoded, setting):
    guard = rigged(target, encoded, {1}, setting)
    _, plain = steps(target, encoded.inputs)

    def fails() -> None:
        with guard.watch():
            steps(target, encoded.inputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    _, after = steps(target, encoded.inputs)
    assert torch.equal(after, plain)


class Interrupting(LogitsProcessor):
    """Asks the same model something else before every token."""

    def __init__(self, ask) -> None:
        self.ask = ask

    def __call__(self, ids, scores):
        self.ask()
        return scores


@both_ways
def test_nested_generate_calls_cannot_see_each_other(target, encoded, setting):
    guard = rigged(target, encoded, {1}, setting)
    inner = target.encode([sample(1, "colour?"), sample(0)])
    with guard.watch():
        _, alone = steps(target, encoded.inputs)
        _, inner_alone = steps(target, inner.inputs, 2)
    seen = []
    processor = Interrupting(lambda: seen.append(steps(target, inner.inputs, 2)[1]))
    with guard.watch() as w:
        _, logits = steps(target, encoded.inputs, logits_processor=LogitsProcessorList([processor]))
    assert torch.equal(logits, alone)
    assert len(seen) == 4
    assert all(torch.equal(each, inner_alone) for each in seen)
    assert outcomes(w) == [CLEAN, FLAGGED, CLEAN] + [FLAGGED, CLEAN] * 4


@both_ways
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_processor_that_runs_the_model_on_a_prompt_of_its_own(
    target, encoded, setting, use_cache
):
    """As classifier-free guidance does; same batch size, so nothing but the cache tells."""
    guard = rigged(target, encoded, {1}, setting)
    other = target.encode([sample(0), sample(2, "shapes and sizes?"), sample(1, "colour?")])
    with guard.watch(), torch.no_grad():
        _, alone = steps(target, encoded.inputs)
        inner_alone = target.model(**other.inputs).logits
    seen = []

    def ask() -> None:
        cache = {CACHE: DynamicCache()} if use_cache else {"use_cache": False}
        with torch.no_grad():
            seen.append(target.model(**other.inputs, **cache).logits)

    processor = LogitsProcessorList([Interrupting(ask)])
    with guard.watch() as w:
        _, logits = steps(target, encoded.inputs, logits_processor=processor)
    assert torch.equal(logits, alone)
    assert all(torch.equal(each, inner_alone) for each in seen)
    assert outcomes(w) == [CLEAN, FLAGGED, CLEAN] + [CLEAN, CLEAN, FLAGGED] * 4


def test_nested_watches_the_inner_one_judges(target, encoded):
    outer, inner = (rigged(target, encoded, {i}, WIDEN) for i in (0, 1))
    with outer.watch() as a:
        with inner.watch() as b:
            steps(target, encoded.inputs, 2)
        assert outcomes(b) == [CLEAN, FLAGGED, CLEAN]
        assert not a.verdicts
        steps(target, encoded.inputs, 2)
    assert outcomes(a) == [FLAGGED, CLEAN, CLEAN]
    assert len(b.verdicts) == 3


def test_a_guard_of_another_model_inside_leaves_the_outer_one_at_work(target, encoded, llava):
    """Guarding is per model: the inner block must not switch the outer one off."""
    second = load(llava)
    outer, inner = rigged(target, encoded, {0}, WIDEN), rigged(second, encoded, {1}, WIDEN)
    with outer.watch() as a, inner.watch() as b:
        steps(target, encoded.inputs, 2)
        steps(second, encoded.inputs, 2)
    assert outcomes(a) == [FLAGGED, CLEAN, CLEAN]
    assert outcomes(b) == [CLEAN, FLAGGED, CLEAN]


def in_threads(*jobs) -> None:
    """Run jobs at once, started together; raises what a job raised."""
    barrier, errors = threading.Barrier(len(jobs)), []

    def run(job) -> None:
        barrier.wait()
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("shared", [False, True], ids=["two-models", "one-model"])
def test_two_threads_cannot_see_each_other(target, encoded, llava, shared):
    second = target if shared else load(llava)
    jobs = []
    for model, flagged, length in ((target, 0, 5), (second, 1, 7)):
        guard = rigged(model, encoded, {flagged}, WIDEN)
        with guard.watch():
            _, alone = steps(model, encoded.inputs, length)

        def job(model=model, guard=guard, flagged=flagged, length=length, alone=alone) -> None:
            for _ in range(4):
                with guard.watch() as w:
                    _, logits = steps(model, encoded.inputs, length)
                assert outcomes(w) == [FLAGGED if i == flagged else CLEAN for i in range(3)]
                assert torch.equal(logits, alone)

        jobs.append(job)
    in_threads(*jobs)


def test_streaming_from_a_thread_of_its_own(target, encoded):
    """The usual way to stream: generate runs elsewhere, the watch is open here."""
    one = target.encode([sample(1, "colour?")])
    guard = rigged(target, encoded, {1}, WIDEN)
    with guard.watch():
        expected, _ = steps(target, one.inputs, 6)
    streamer = TextIteratorStreamer(target.processor.tokenizer, skip_prompt=True)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "streamer": streamer}
    with guard.watch() as w:
        writer = threading.Thread(target=target.model.generate, kwargs={**one.inputs, **options})
        writer.start()
        pieces = []
        for piece in streamer:
            assert outcomes(w) == [FLAGGED], "the verdict is there before the first word"
            pieces.append(piece)
        writer.join()
    text = target.processor.tokenizer.decode(expected[0, one.inputs["input_ids"].shape[1] :])
    assert "".join(pieces) == text


def test_a_thread_outside_of_the_watch_is_refused_not_let_through(target, encoded):
    guard = rigged(target, encoded, {1}, WIDEN)
    with guard.watch(), pytest.raises(UsageError, match="another thread"):
        in_threads(lambda: target.model(**encoded.inputs))
    with guard.watch(), guard.watch(), pytest.raises(UsageError, match="2 open watches"):
        in_threads(lambda: steps(target, encoded.inputs))


def test_the_bare_decoder_is_refused(target, encoded):
    guard = rigged(target, encoded, {1}, WIDEN)
    with guard.watch(), pytest.raises(UsageError, match="call the model itself"):
        target.decoder(input_ids=encoded.inputs["input_ids"])


def test_the_probe_inside_a_watch_sees_the_bare_model(target, encoded):
    guard = rigged(target, encoded, {1}, WIDEN)
    outside = attend(target, encoded).weights
    with guard.watch() as w:
        inside = attend(target, encoded).weights
        assert not w.verdicts
        steps(target, encoded.inputs, 2)
    assert torch.equal(inside, outside)
    assert outcomes(w) == [CLEAN, FLAGGED, CLEAN]


@both_ways
def test_a_loop_of_ones_own_with_a_cache(target, encoded, setting):
    guard = rigged(target, encoded, {1}, setting)
    with guard.watch():
        sequences, expected = steps(target, encoded.inputs)
    length = encoded.inputs["input_ids"].shape[1]
    mask = encoded.inputs["attention_mask"]
    with guard.watch() as w, torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp_min(0)
        out = target.model(**encoded.inputs, position_ids=places, use_cache=True)
        logits = [out.logits[:, -1]]
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            out = target.model(
                input_ids=sequences[:, length + step][:, None],
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1)[:, -1:],
                **{CACHE: out[CACHE]},
            )
            logits.append(out.logits[:, -1])
    assert outcomes(w) == [CLEAN, FLAGGED, CLEAN], "decoding steps add no verdicts"
    assert (torch.stack(logits) - expected).abs().max() < 1e-4


@both_ways
def test_without_a_cache_every_step_reads_the_prompt_again(target, encoded, setting):
    guard = rigged(target, encoded, {1}, setting)
    with guard.watch():
        sequences, expected = steps(target, encoded.inputs)
    with guard.watch() as w:
        again, logits = steps(target, encoded.inputs, use_cache=False)
    assert outcomes(w) == [CLEAN, FLAGGED, CLEAN]
    assert torch.equal(again, sequences)
    assert (logits - expected).abs().max() < 1e-4


@both_ways
def test_sampling_draws_the_same_for_the_innocent(target, encoded, setting):
    guard = rigged(target, encoded, {1}, setting)
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 5, "min_new_tokens": 5}
    torch.manual_seed(3)
    plain = target.model.generate(**encoded.inputs, **options)
    torch.manual_seed(3)
    with guard.watch():
        guarded = target.model.generate(**encoded.inputs, **options)
    assert torch.equal(guarded[[0, 2]], plain[[0, 2]])


def test_other_outputs_of_a_second_look_are_of_one_pass(target, encoded):
    guard = rigged(target, encoded, {1}, WIDEN)
    options = {"output_hidden_states": True, "output_attentions": False}
    with guard.watch(), torch.no_grad():
        out = target.model(**encoded.inputs, use_cache=True, **options)
    with torch.no_grad():
        plain = target.model(**encoded.inputs, use_cache=True, **options)
    assert len(out.hidden_states) == len(plain.hidden_states)
    assert out[CACHE].get_seq_length() == plain[CACHE].get_seq_length()
    assert torch.equal(out.hidden_states[-1][0], plain.hidden_states[-1][0])


def test_eager_attention_maps_show_what_was_hidden(llava, encoded):
    eager = load(llava)
    eager.model.set_attn_implementation("eager")
    guard = rigged(eager, encoded, {1}, WIDEN)
    with guard.watch() as w, torch.no_grad():
        maps = eager.model(**encoded.inputs, output_attentions=True).attentions
    image = (encoded.key_kind[1] == 1).nonzero().flatten()
    slots = image[torch.from_numpy(w.verdicts[1].tokens[0].ravel())]
    assert len(maps) == 4
    for layer in maps:
        assert (layer[1, :, -1, slots] == 0).all()
        assert (layer[0, :, -1] > 0).any()


def test_text_only_is_answered_and_not_judged(target, encoded):
    guard = rigged(target, encoded, {1}, WIDEN)
    batch = target.processor(text=["USER: hello\nASSISTANT:"], return_tensors="pt")
    with guard.watch(fail_closed=True) as w:
        steps(target, batch)
    (verdict,) = w.verdicts
    assert verdict.outcome is INCONCLUSIVE
    assert not verdict.applicable
    assert "no image" in verdict.reason
    assert verdict.score is verdict.p_value is verdict.tokens is None


def test_text_only_next_to_a_flagged_image(target, encoded):
    guard = rigged(target, encoded, {1}, ONE_PASS)
    image = target.encode([sample(1, "colour?")])
    text = target.processor.tokenizer("USER: hello\nASSISTANT:", add_special_tokens=False)
    ids = text["input_ids"]
    length = image.inputs["input_ids"].shape[1]
    row = torch.tensor([[0] * (length - len(ids)) + ids])
    batch = {
        "input_ids": torch.cat([image.inputs["input_ids"], row]),
        "attention_mask": torch.cat([image.inputs["attention_mask"], (row != 0).long()]),
        "pixel_values": image.inputs["pixel_values"],
    }
    _, plain = steps(target, batch)
    with guard.watch() as w:
        _, logits = steps(target, batch)
    assert outcomes(w) == [FLAGGED, INCONCLUSIVE]
    assert torch.equal(logits[:, 1], plain[:, 1])
    assert not torch.equal(logits[:, 0], plain[:, 0])


def test_an_image_without_words_is_inconclusive(target, encoded):
    guard = rigged(target, encoded, {1}, WIDEN)
    wordless = target.encode([sample(0, "x")])
    keep = wordless.key_kind[0] != 2
    batch = {
        "input_ids": wordless.inputs["input_ids"][:, keep],
        "attention_mask": wordless.inputs["attention_mask"][:, keep],
        "pixel_values": wordless.inputs["pixel_values"],
    }
    with guard.watch() as w:
        steps(target, batch)
    assert outcomes(w) == [INCONCLUSIVE]
    assert "no words" in w.verdicts[0].reason
    with guard.watch(fail_closed=True), pytest.raises(RefusedError, match="could not be judged"):
        steps(target, batch)


@pytest.mark.parametrize("where", ["image", "logits"])
def test_nan_is_inconclusive_for_its_sample_alone(target, encoded, where):
    guard = rigged(target, encoded, {1}, ONE_PASS)
    inputs = {name: value.clone() for name, value in encoded.inputs.items()}
    if where == "image":
        inputs["pixel_values"][0] = float("nan")
        hook = None
    else:

        def spoil(module, args, output):
            output = output.clone()
            output[0] = float("nan")
            return output

        hook = target.base.lm_head.register_forward_hook(spoil)
    with guard.watch() as w, torch.no_grad():
        target.model(**inputs)
    assert outcomes(w) == [INCONCLUSIVE, FLAGGED, CLEAN]
    assert "not finite" in w.verdicts[0].reason
    assert w.verdicts[0].applicable
    with guard.watch(fail_closed=True), pytest.raises(RefusedError, match="not finite"):
        target.model(**inputs)
    if hook:
        hook.remove()


def test_prompts_that_cannot_be_read_are_never_clean(target, encoded):
    guard = rigged(target, encoded, {1}, WIDEN)
    embeddings = target.base.get_input_embeddings()(encoded.inputs["input_ids"])
    with guard.watch() as w, torch.no_grad():
        target.model(inputs_embeds=embeddings)
    assert outcomes(w) == [INCONCLUSIVE] * 3
    assert "embeddings" in w.verdicts[0].reason
    with torch.no_grad():
        cache = target.model(**encoded.inputs, use_cache=True)[CACHE]
    one = torch.full((3, 1), 40)
    with guard.watch() as w, torch.no_grad():
        target.model(input_ids=one, **{CACHE: cache})
    assert outcomes(w) == [INCONCLUSIVE] * 3
    assert "cache" in w.verdicts[0].reason


@both_ways
def test_going_on_from_a_guarded_cache_keeps_the_tokens_hidden(target, encoded, setting):
    """A second turn on the cache of the first: not judged anew, but still disarmed."""
    guard = rigged(target, encoded, {1}, setting)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with guard.watch() as w:
        first = target.model.generate(**encoded.inputs, **options)
        (tokens,) = w.verdicts[1].tokens
        more = torch.cat([first.sequences, torch.full((3, 2), 40)], 1)
        mask = encoded.inputs["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(3, more.shape[1] - mask.shape[1])], 1)
        second = target.model.generate(
            input_ids=more,
            attention_mask=mask,
            **{CACHE: first[CACHE]},
            **options,
        )
    assert outcomes(w) == [CLEAN, FLAGGED, CLEAN] + [INCONCLUSIVE] * 3
    hidden = encoded.key_kind[1] == 1
    hidden[hidden.clone()] = torch.from_numpy(tokens.ravel())
    eager = target
    eager.model.set_attn_implementation("eager")
    try:
        with mask_edited(eager, {1: hidden}, guard.plan.hide_from):
            _, expected = steps(
                eager, {**encoded.inputs, "input_ids": more, "attention_mask": mask}, 3
            )
    finally:
        eager.model.set_attn_implementation("sdpa")
    assert (torch.stack(second.logits) - expected).abs().max() < 1e-4


def test_ways_of_generating_that_cannot_be_guarded(target, encoded):
    guard = rigged(target, encoded, {1}, WIDEN)
    with guard.watch(), pytest.raises(UsageError, match="assisted"):
        target.model.generate(**encoded.inputs, assistant_model=target.base, max_new_tokens=2)
    one = target.encode([sample(0)])
    with guard.watch(), pytest.raises(UsageError, match="prefill_chunk_size"):
        steps(target, one.inputs, prefill_chunk_size=8)
    with guard.watch(), pytest.raises(UsageError, match="guessed tokens"):
        steps(target, one.inputs, 8, prompt_lookup_num_tokens=3)


@both_ways
def test_options_in_a_generation_config(target, encoded, setting):
    """The guard adds an option of its own; the caller's object stays as it was."""
    guard = rigged(target, encoded, {1}, setting)
    config = GenerationConfig(
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        cache_implementation="static",
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    before = config.to_dict()
    with guard.watch():
        expected, _ = steps(target, encoded.inputs)
        found = target.model.generate(**encoded.inputs, generation_config=config)
    assert torch.equal(found.sequences, expected)
    assert config.to_dict() == before


def test_half_precision(llava, encoded):
    target = load(llava, dtype="bfloat16")
    guard = rigged(target, encoded, {1}, WIDEN)
    _, plain = steps(target, encoded.inputs)
    with guard.watch() as w:
        _, logits = steps(target, encoded.inputs)
    assert outcomes(w) == [CLEAN, FLAGGED, CLEAN]
    assert torch.equal(logits[:, [0, 2]], plain[:, [0, 2]])
    assert not torch.equal(logits[:, 1], plain[:, 1])


def test_a_watch_does_not_keep_caches_alive(target, encoded):
    import weakref

    guard = rigged(target, encoded, {1}, WIDEN)
    with guard.watch(), torch.no_grad():
        out = target.model(**encoded.inputs, use_cache=True)
        cache = weakref.ref(out[CACHE])
        del out
        gc.collect()
        assert cache() is None


def test_a_purified_answer_that_stays_is_not_disarmed(target, encoded, monkeypatch):
    asked = [sample(0), sample(1, "colour?"), sample(2, "shapes and sizes?")]
    guard = rigged(target, encoded, {1}, WIDEN)
    bare = [one.answer for one in answer(guard, asked, mode="detect", max_new_tokens=8)]
    found = answer(guard, asked, max_new_tokens=8)
    assert [one.disarmed for one in found] == [None, found[1].answer != bare[1], None]
    passes = []
    counting = target.base.lm_head.register_forward_hook(lambda *_: passes.append(1))
    answer(guard, asked, max_new_tokens=8, compare=False)
    alone = len(passes)
    answer(guard, asked, max_new_tokens=8)
    counting.remove()
    assert alone < len(passes) - alone <= 2 * alone, "one more generation, of the flagged alone"

    def nothing(look, image, images, flagged):
        yield from ()
        return torch.zeros_like(image)

    monkeypatch.setattr(guard, "hiding", nothing)
    assert [one.disarmed for one in answer(guard, asked, max_new_tokens=8)] == [None, False, None]
    assert [one.disarmed for one in answer(guard, asked, max_new_tokens=8, mode="detect")] == (
        [None] * 3
    )


def test_loading_from_python_draws_no_bars(llava, capfd):
    load(llava)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
