"""Requests that share a batch: each gets its own answer, as if it had been alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from gazeguard.errors import RowError
from gazeguard.models.target import Encoded
from gazeguard.server import engine as engines
from gazeguard.server.batch import encode, fits, together
from gazeguard.server.errors import ApiError
from gazeguard.server.requests import Conversation
from gazeguard.types import ImagePart, KeyKind, TextPart, Turn
from tests.contract.conftest import sample, tiny_folder, tiny_target  # noqa: F401
from tests.server.conftest import about, serving

ASK = [{"role": "user", "content": "hello there"}]


def at_once(server, asked):
    """Answers (or errors) of requests that are sent together; `asked` are arguments of `ask`."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda one: tried(server, *one), asked))


def tried(server, messages, options):
    try:
        return server.ask(messages, **options)
    except openai.APIStatusError as error:
        return error


def said(answer):
    """All of an answer that must not depend on its neighbours."""
    if isinstance(answer, openai.APIStatusError):
        return answer.status_code, answer.code
    choice = answer.choices[0]
    verdict = answer.gazeguard
    told = (verdict["outcome"], verdict["action"], verdict["images"])
    return choice.message.content, choice.finish_reason, answer.usage, told


@pytest.mark.parametrize("mode", ["purify", "block"])
def test_together_is_as_alone(guard, clean, triggered, mode):
    asked = [(about(row), {}) for row in [*clean[:2], *triggered[:2]]]
    asked += [
        (about(clean[3], "What color is the object at the very top of this picture?"), {}),
        (about(clean[4]), {"max_tokens": 3}),
        (about(clean[5]), {"temperature": 1.5, "top_p": 0.9, "seed": 5}),
        (about(clean[5]), {"temperature": 1.5, "seed": 6, "stop": " at "}),
    ]
    with serving(guard, mode=mode, max_batch=1) as server:
        alone = [said(tried(server, *one)) for one in asked]
        assert server.metric("gazeguard_batch_requests_count") == len(asked)
    with serving(guard, mode=mode, max_batch=8, max_wait=20) as server:
        both = [said(answer) for answer in at_once(server, asked)]
        assert server.metric("gazeguard_batch_requests_count") == 1, "one batch"
    assert both == alone
    if mode == "block":
        assert both[2] == both[3] == (400, "content_filter")
        assert (400, "content_filter") not in both[:2]


def test_what_does_not_fit_waits_for_the_next_batch(guard, clean):
    with serving(guard, max_batch=4, max_wait=0.3) as server:
        found = at_once(server, [(about(clean[0]), {}), (ASK, {}), (about(clean[1]), {})])
        assert [answer.gazeguard["applicable"] for answer in found] == [True, False, True]
        assert server.metric("gazeguard_batch_requests_count") in (2, 3)


def test_nan_is_the_fault_of_one_request_alone(guard, clean):
    """In the logits of one row of a batch; the others are answered."""

    def spoil(module, args, output):
        output = output.clone()
        output[0] = float("nan")
        return output

    for refuse in (True, False):
        with serving(
            guard, max_batch=2, max_wait=20, on_guard_error="refuse" if refuse else "pass"
        ) as server:
            hook = guard.target.base.lm_head.register_forward_hook(spoil)
            try:
                found = at_once(server, [(about(clean[0]), {}), (about(clean[1]), {})])
            finally:
                hook.remove()
            errors = [a for a in found if isinstance(a, openai.InternalServerError)]
            assert len(errors) == 1
            assert errors[0].code == ("guard_inconclusive" if refuse else "not_finite")
            if refuse:
                assert errors[0].response.json()["gazeguard"]["outcome"] == "inconclusive"
                assert errors[0].response.headers["x-should-retry"] == "false"
            after = at_once(server, [(about(clean[0]), {}), (about(clean[1]), {})])
            assert [a.gazeguard["outcome"] for a in after] == ["clean"] * 2, "it goes on"


def test_a_batch_that_fails_is_tried_one_by_one(guard, clean, monkeypatch, caplog):
    """Too little memory for all, or one request that breaks the model."""
    real, sizes = engines.answer, []

    def fails(guard, rows, settings):
        sizes.append(len(rows))
        if len(rows) > 1 or rows[0].job.options.max_tokens == 7:
            raise torch.OutOfMemoryError("not enough memory")
        real(guard, rows, settings)

    monkeypatch.setattr(engines, "answer", fails)
    with serving(guard, max_batch=3, max_wait=20) as server:
        asked = [
            (about(row), {"max_tokens": n}) for row, n in zip(clean, (40, 7, 40), strict=False)
        ]
        found = at_once(server, asked)
        assert [isinstance(a, openai.InternalServerError) for a in found] == [False, True, False]
        assert found[1].code == "internal_error"
        assert "memory" not in str(found[1]), "the log has the details, the client has not"
    assert sizes == [3, 1, 1, 1]
    assert "Traceback" in caplog.text


def test_answers_do_not_mix_under_load(server, clean):
    """Different questions from many threads at once, each several times."""
    expected = [server.ask(about(row)).choices[0].message.content for row in clean]
    assert len(set(expected)) == len(clean)
    start = threading.Barrier(len(clean))

    def many(i):
        start.wait()
        return [server.ask(about(clean[i])).choices[0].message.content for _ in range(2)]

    with ThreadPoolExecutor(len(clean)) as pool:
        assert list(pool.map(many, range(len(clean)))) == [[text] * 2 for text in expected]
    assert server.metric("gazeguard_in_house_requests") == 0


FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "idefics3", "gemma3", "paligemma")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_by_one_then_padded_is_what_the_processor_makes_of_all(tiny_target, family):  # noqa: F811
    target = tiny_target(family)
    samples = [
        sample(0, [(56, 56)], 0, "what is it?"),
        sample(1, [(56, 56)], 0, "a longer question?"),
    ]
    alone = [encode(target, one) for one in samples]
    assert fits(alone[0]) == fits(alone[1])
    both = together(alone, target.processor.tokenizer.pad_token_id)
    expected = target.encode(samples)
    assert set(both.inputs) == set(expected.inputs)
    for name, value in expected.inputs.items():
        assert torch.equal(both.inputs[name], value), name
    assert torch.equal(both.key_kind, expected.key_kind)
    assert both.images == expected.images
    text = encode(target, Conversation(0, "", (), without_images(samples[0])))
    assert fits(text) != fits(alone[0])
    assert generates(target, text)
    assert generates(target, both)
    with pytest.raises(ApiError, match="image placeholder"):
        encode(target, Conversation(0, "", (), placeholder(target)))


def without_images(one):
    return (Turn("user", tuple(p for p in one.turns[0].parts if isinstance(p, TextPart))),)


def placeholder(target):
    return (Turn("user", (TextPart(f"see {target.processor.image_token}"),)),)


def generates(target, encoded: Encoded) -> bool:
    out = target.base.generate(**encoded.inputs, max_new_tokens=2, do_sample=False)
    return out.shape[1] > encoded.inputs["input_ids"].shape[1]


def test_a_conversation_is_answered_after_its_last_turn(guard):
    turns = (
        Turn("user", (ImagePart(0), TextPart("one"))),
        Turn("assistant", (TextPart("red square"),)),
        Turn("user", (TextPart("two"),)),
    )
    image = sample(0, [(64, 64)], 0, "x").images
    found = encode(guard.target, Conversation(0, "", image, turns))
    ids, kind = found.inputs["input_ids"][0], found.key_kind[0]
    decode = guard.target.processor.tokenizer.decode
    assert "red square" in decode(ids)
    # The earlier answer is not the user's words.
    assert "".join(decode(ids[kind == KeyKind.PROMPT]).split()) == "onetwo"
    with pytest.raises(RowError):
        guard.target.encode([Conversation(0, "", (), turns[2:])])
