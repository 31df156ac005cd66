"""Pieces of text, stop texts, and the draw of a token, without a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gazeguard.assets import BASE
from gazeguard.server.requests import Options
from gazeguard.server.sampling import Chooser
from gazeguard.server.text import Detokenizer, Stopper

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def bytewise() -> Tokenizer:
    """One token a byte: every letter beyond ASCII spans tokens."""
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(BYTES)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


LAB = Tokenizer.from_file(str(BASE / "tokenizer.json"))
BYTEWISE = bytewise()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
@settings(deadline=None)
def test_pieces_are_whole_letters_and_make_the_text(text):
    for tokenizer in (BYTEWISE, LAB):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        reader = Detokenizer(tokenizer)
        pieces = [*map(reader.add, ids), reader.end()]
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text and tokenizer is BYTEWISE:
            assert not any("\ufffd" in piece for piece in pieces)


def test_broken_bytes_do_not_wait_for_ever():
    reader = Detokenizer(BYTEWISE)
    broken = BYTEWISE.encode("\xe9", add_special_tokens=False).ids[:1]
    pieces = [reader.add(broken[0]) for _ in range(20)]
    assert "".join(pieces).count("\ufffd") >= 16
    assert pieces[:7] == [""] * 7


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_however_the_text_is_cut(text, stops):
    def run(pieces) -> tuple[str, bool]:
        stopper = Stopper(stops)
        out = ""
        for piece in pieces:
            out += stopper.add(piece)
            if stopper.stopped:
                return out, True
        return out + stopper.end(), False

    by_letter = run(text)
    # A stop text that is complete first ends the answer, whichever begins first.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    assert by_letter == (expected, bool(ends))
    for n in (2, 3):
        cut = [text[i : i + n] for i in range(0, len(text), n)]
        assert run(cut)[1] == bool(ends)


def test_nothing_is_held_that_no_stop_text_begins_with():
    stopper = Stopper(["END"])
    assert [stopper.add(p) for p in ("  ", " a", "b E", "N", "x", "EN")] == [
        "",
        "a",
        "b ",
        "",
        "ENx",
        "",
    ]
    assert stopper.end() == "EN"


def options(temperature=1.0, top_p=1.0, seed=0) -> Options:
    return Options(1, temperature, top_p, seed, ())


def test_rows_are_drawn_by_their_own_rules():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    n = 4000
    rows = [options(seed=i) for i in range(n)]
    drawn = torch.tensor(Chooser(rows)(logits.expand(n, 4)))
    share = torch.bincount(drawn, minlength=4) / n
    assert (share - logits.exp()).abs().max() < 0.03
    nucleus = torch.tensor(
        Chooser([options(top_p=0.7, seed=i) for i in range(n)])(logits.expand(n, 4))
    )
    assert set(nucleus.tolist()) == {0, 1}, "0.5 alone is not 0.7, with 0.3 it is more"
    assert abs((nucleus == 0).float().mean() - 0.5 / 0.8) < 0.03
    hot = torch.tensor(Chooser([options(2.0, seed=i) for i in range(n)])(logits.expand(n, 4)))
    flat = torch.softmax(logits / 2, 0)
    assert ((torch.bincount(hot, minlength=4) / n) - flat).abs().max() < 0.03


@pytest.mark.parametrize("cold", [options(0), options(1e-300), options(1.0, 0), options(0.5, 1e-9)])
def test_the_likeliest(cold):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 1e4
    assert Chooser([cold])(logits) == [int(logits.argmax())]


def test_a_row_does_not_depend_on_its_neighbours():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [options(seed=1), options(0), options(1.5, 0.8, 2)]
    both, alone = Chooser(rows), [Chooser([row]) for row in rows]
    for _ in range(5):
        assert both(logits) == [one(row[None])[0] for one, row in zip(alone, logits, strict=True)]


def test_what_is_no_number_is_not_drawn():
    bad = torch.zeros(4, 5)
    bad[0, 2], bad[1, 1], bad[2] = float("nan"), float("inf"), float("-inf")
    bad[3, :4] = float("-inf")
    for rule in (options(0), options()):
        assert Chooser([rule] * 4)(bad) == [None, None, None, 4]
