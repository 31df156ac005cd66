"""What the official client sees: answers, streams, verdicts, histories, errors."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import openai
import pytest
import requests

from gazeguard.guarding.answer import answer
from gazeguard.lab.poison import TARGET
from gazeguard.server.metrics import TABLE
from tests.server.conftest import about, as_sample, picture, png, serving

ASK = {"role": "user", "content": "hello"}


def joined(stream) -> str:
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


def test_answers_and_verdicts_are_those_of_the_library(server, guard, clean, triggered):
    for row in [*clean[:2], triggered[0]]:
        (expected,) = answer(guard, [as_sample(row)], max_new_tokens=40)
        found = server.ask(about(row))
        assert found.choices[0].message.content == expected.answer
        assert found.gazeguard["outcome"] == expected.verdict.outcome
        assert found.gazeguard["score"] == pytest.approx(expected.verdict.score, rel=1e-4)
        assert found.object == "chat.completion"
        assert found.model == "lab"
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_trigger_is_disarmed_and_said_so_in_header_and_body(server, triggered):
    raw = server.openai.chat.completions.with_raw_response.create(
        model="lab", messages=about(triggered[0]), temperature=0, max_tokens=40
    )
    found = raw.parse()
    assert raw.headers["x-gazeguard-outcome"] == found.gazeguard["outcome"] == "flagged"
    assert raw.headers["x-gazeguard-action"] == found.gazeguard["action"] == "purified"
    assert float(raw.headers["x-gazeguard-suspicion"]) == pytest.approx(
        found.gazeguard["suspicion"], rel=1e-4
    )
    assert raw.headers["x-request-id"].startswith("req_")
    assert found.gazeguard["hidden"]
    (image,) = found.gazeguard["images"]
    assert (image["grid"], image["image_tokens"]) == ([8, 8], 64)
    assert image["tokens"]
    assert TARGET not in found.choices[0].message.content


def test_detect_answers_as_the_model_would_and_block_refuses(guard, triggered, clean):
    with serving(guard, mode="detect") as server:
        found = server.ask(about(triggered[0]))
        assert found.choices[0].message.content == TARGET
        assert found.gazeguard["action"] == "answered"
        assert not found.gazeguard["hidden"]
    with serving(guard, mode="block") as server:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as error:
                server.ask(about(triggered[0]), stream=stream)
            assert error.value.code == "content_filter"
            body = error.value.response.json()
            assert body["gazeguard"]["outcome"] == "flagged"
            assert body["gazeguard"]["action"] == "blocked"
            assert error.value.response.headers["x-gazeguard-outcome"] == "flagged"
        assert server.ask(about(clean[0])).gazeguard["outcome"] == "clean"
        assert server.metric("gazeguard_verdicts_total") == 3


@pytest.mark.parametrize("mode", ["purify", "block"])
def test_clients_need_not_learn_the_numbers(guard, triggered, clean, mode):
    with serving(guard, mode=mode, tell="outcome") as server:
        for row, outcome in ((clean[0], "clean"), (triggered[0], "flagged")):
            response = server.post({"model": "lab", "messages": about(row), "max_tokens": 2})
            said = response.json()["gazeguard"]
            assert set(said) == {"outcome", "action", "applicable"}
            assert said["outcome"] == response.headers["x-gazeguard-outcome"] == outcome
            assert "x-gazeguard-suspicion" not in response.headers
            assert not re.search(r"distance|p = ", response.text)
        assert server.metric("gazeguard_suspicion_ratio_count") == 2, "the operator sees them"


def test_a_stream_says_the_same(server, clean, triggered):
    for row in (clean[0], triggered[0]):
        whole = server.ask(about(row))
        chunks = list(server.ask(about(row), stream=True, stream_options={"include_usage": True}))
        assert joined(chunks) == whole.choices[0].message.content
        assert len(chunks) > 4, "in pieces"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[0].gazeguard["outcome"] == whole.gazeguard["outcome"]
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage == whole.usage
        assert len({chunk.id for chunk in chunks}) == 1


def test_the_verdict_is_there_before_the_first_word(server, triggered):
    body = {"model": "lab", "messages": about(triggered[0]), "stream": True, "max_tokens": 20}
    with server.post(body, stream=True) as response:
        assert response.headers["x-gazeguard-outcome"] == "flagged"
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.text.rstrip().endswith("data: [DONE]")
    plain = {"model": "lab", "messages": [ASK], "stream": True, "max_tokens": 2}
    text = server.post(plain).text
    assert '"usage"' not in text, "only when asked for"


def test_text_alone_is_answered_and_not_judged(server):
    found = server.ask([{"role": "system", "content": "Be brief."}, ASK])
    assert found.gazeguard["outcome"] == "inconclusive"
    assert found.gazeguard["applicable"] is False
    assert found.gazeguard["action"] == "answered"
    assert found.choices[0].message.content


def test_several_images_and_a_history(server, clean, triggered):
    two = [picture(png(row.pixels)) for row in clean[:2]]
    first = {"role": "user", "content": [two[0], {"type": "text", "text": "Describe the image."}]}
    before = server.ask([first])
    reply = before.choices[0].message.model_dump()  # brings empty fields such as tool_calls
    second = {"role": "user", "content": [two[1], {"type": "text", "text": "And this one?"}]}
    found = server.ask([first, reply, second])
    assert found.usage.prompt_tokens > 2 * 64 + before.usage.completion_tokens
    assert found.gazeguard["applicable"]
    both = {"role": "user", "content": [*two, {"type": "text", "text": "Describe the image."}]}
    assert server.ask([both]).usage.prompt_tokens > 128
    # The picture of an earlier turn is still in the model's sight.
    bad = [picture(png(triggered[0].pixels)), {"type": "text", "text": "Describe the image."}]
    talk = [{"role": "user", "content": bad}, reply, {"role": "user", "content": "And now?"}]
    assert server.ask(talk).usage.prompt_tokens > 64


def test_the_verdict_tells_several_images_apart(guard, clean):
    """A guard that flags everything and that nothing calms hides all of both."""
    wary = copy.copy(guard)
    wary.threshold = -1.0  # distances are not negative
    two = [picture(png(row.pixels)) for row in clean[:2]]
    both = {"role": "user", "content": [*two, {"type": "text", "text": "Describe the image."}]}
    with serving(wary) as server:
        found = server.ask([both], max_tokens=2).gazeguard
        again = server.ask(about(clean[0]), max_tokens=2).gazeguard
    whole = {"grid": [8, 8], "image_tokens": 64, "tokens": list(range(64))}
    assert (found["action"], found["images"]) == ("purified", [whole, whole])
    assert again["images"] == [whole]


def test_length_and_stop_texts(server, clean):
    whole = server.ask(about(clean[0])).choices[0].message.content
    words = whole.split()
    short = server.ask(about(clean[0]), max_completion_tokens=3, max_tokens=None)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 3
    assert whole.startswith(short.choices[0].message.content)
    stop = f"{words[1]} {words[2]}"  # spans tokens
    for stream in (False, True):
        found = server.ask(about(clean[0]), stop=["nowhere", stop], stream=stream)
        text = joined(found) if stream else found.choices[0].message.content
        assert text == whole[: whole.index(stop)]
    assert server.ask(about(clean[0]), stop=stop).choices[0].finish_reason == "stop"


def test_a_seed_draws_the_same_and_another_seed_does_not(server):
    def draw(seed: int | None) -> str:
        found = server.ask([ASK], temperature=2.0, seed=seed, max_tokens=20)
        return found.choices[0].message.content

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in (1, 2, 3, None, None)}) > 3
    greedy = server.ask([ASK], max_tokens=20).choices[0].message.content
    cold = server.ask([ASK], temperature=1e-9, max_tokens=20).choices[0].message.content
    narrow = server.ask([ASK], temperature=2.0, top_p=0, max_tokens=20).choices[0].message.content
    assert cold == narrow == greedy


def test_models_and_health(server):
    (served,) = server.openai.models.list().data
    assert server.openai.models.retrieve("lab") == served
    with pytest.raises(openai.NotFoundError, match="only 'lab'"):
        server.openai.models.retrieve("org/other")
    with pytest.raises(openai.NotFoundError) as error:
        server.openai.chat.completions.create(model="other", messages=[ASK])
    assert error.value.code == "model_not_found"
    assert requests.get(f"{server.url}/health", timeout=5).json() == {"status": "ready"}


def test_metrics_are_those_of_the_table_and_of_the_page(server, clean):
    before = server.metric("gazeguard_generated_tokens_total")
    found = server.ask(about(clean[0]))
    after = server.metric("gazeguard_generated_tokens_total")
    assert after - before == found.usage.completion_tokens
    shown = requests.get(f"{server.url}/metrics", timeout=5).text
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text("utf-8")
    for metric in TABLE.values():
        assert f"# HELP {metric.name.removesuffix('_total')}" in shown.replace("_total ", " ")
        assert f"`{metric.name}`" in page
    assert set(re.findall(r"`(gazeguard_\w+)`", page)) == {m.name for m in TABLE.values()}
