"""Finding the user's words in a rendered prompt, with templates of many habits."""

from __future__ import annotations

import pytest
from PIL import Image

from gazeguard.errors import ModelError, RowError
from gazeguard.models.family import Family
from gazeguard.models.spans import (
    Prompt,
    answer_tokens,
    placeholder_tokens,
    user_tokens,
    write_answers,
    write_apart,
    write_prompt,
)
from gazeguard.types import ImagePart, Sample, TextPart, Turn

LOOP = "{%% for c in m.content %%}{{ '<image>' if c.type == 'image' else %s }}{%% endfor %%}"
TEMPLATES = {
    "plain": ("{{ m.role }}: " + LOOP % "c.text" + "{{ '\n' }}", lambda t: t),
    "trimmed": ("[{{ m.role }}]" + LOOP % "c.text | trim", lambda t: t.strip()),
    "images first": (
        "{% for c in m.content %}{% if c.type == 'image' %}<image>{% endif %}{% endfor %}"
        "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}",
        lambda t: t,
    ),
    "no separator": (LOOP % "c.text", lambda t: t),
}


class Processor:
    """The two methods of a processor that writing a prompt needs, with real jinja."""

    def __init__(self, per_message):
        self.chat_template = "{% for m in messages %}" + per_message + "{% endfor %}ASSISTANT:"

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        from transformers.utils.chat_template_utils import render_jinja_template

        assert add_generation_prompt
        assert not tokenize
        return render_jinja_template([messages], chat_template=self.chat_template)[0][0]


def sample(*turns):
    made = tuple(
        Turn(role, tuple(ImagePart(p) if isinstance(p, int) else TextPart(p) for p in parts))
        for role, *parts in turns
    )
    return Sample(0, "id", (Image.new("RGB", (4, 4)),) * 2, made)


def write(template, *turns, reserved=("<image>",)):
    return write_prompt(Family("test"), Processor(template), sample(*turns), reserved)


@pytest.mark.parametrize("habit", TEMPLATES)
@pytest.mark.parametrize(
    "texts",
    [
        ("what colour?",),
        ("user", "user: ", "ASSISTANT:"),
        (" leading", "trailing \n", "\ttab"),
        ("same", "same", "same"),
        ("{{ m.role }}", "<s>\\1.*$"),
        ("",),
        ("  ",),
    ],
)
def test_user_words_are_found_exactly(habit, texts):
    template, form = TEMPLATES[habit]
    parts = [part for i, text in enumerate(texts) for part in (text, *([0] if i == 0 else []))]
    prompt = write(template, ("system", "user rules"), ("user", *parts))
    found = [prompt.laid_out[start:end] for start, end in prompt.user]
    assert found == [form(text) for text in texts if text]
    assert "user rules" not in found
    assert prompt.images == (0,)


def test_images_in_prompt_order_and_without_the_answer():
    prompt = write(
        TEMPLATES["plain"][0], ("user", 1, "a", 0), ("assistant", "hidden"), ("user", "later", 0)
    )
    assert prompt.images == (1, 0)
    assert "hidden" not in prompt.text
    assert "later" not in prompt.text


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (LOOP % "c.text | upper", "rewrites"),
        ("{% for c in m.content %}{{ '<image>' if c.type == 'image' }}{% endfor %}", "drops"),
        ("{{ raise_exception('roles must alternate') }}", "refuses.*roles must alternate"),
        ("{{ m.role + m.content }}", "refuses"),
    ],
)
def test_templates_that_cannot_be_followed(template, match):
    with pytest.raises(RowError, match=match):
        write(template, ("user", 0, "words"))


def test_bad_rows():
    plain = TEMPLATES["plain"][0]
    with pytest.raises(RowError, match="has no image"):
        write(plain, ("user", "words"))
    with pytest.raises(RowError, match="has no image"):
        write(plain, ("assistant", 0, "words"))
    with pytest.raises(RowError, match="lacks"):
        write(plain, ("user", 2, "words"))
    with pytest.raises(RowError, match="placeholder '<image>'"):
        write(plain, ("user", 0, "see <image> here"))
    with pytest.raises(RowError, match="placeholder '<image>'"):
        write(plain, ("system", "an <image> comes"), ("user", 0, "words"))


def test_no_template_is_the_models_fault():
    processor = Processor("")
    processor.chat_template = None
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        write_prompt(Family("test"), processor, sample(("user", 0, "words")), ())


def replacement(start, old, new_start, new):
    return {
        "span": (start, start + len(old)),
        "new_span": (new_start, new_start + len(new)),
        "text": old,
        "replacement": new,
    }


def test_tokens_after_stretched_images():
    """`a<i>bc<i>d` with images of 4 and 2 characters, one token per character."""
    prompt = Prompt("", "a<i>bc<i>d", ((0, 1), (5, 6), (9, 10)), (0, 1))
    grown = [replacement(1, "<i>", 1, "####"), replacement(6, "<i>", 7, "##")]
    offsets = [(0, 0), *((i, i + 1) for i in range(10))]  # a zero-width BOS first
    #           bos a  #  #  #  #  b  c  #  #  d
    expected = [0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1]
    assert [int(user) for user in user_tokens(prompt, grown, offsets)] == expected


def test_a_token_across_the_border_is_the_users():
    prompt = Prompt("", "Q: why?\n", ((3, 7),), ())
    offsets = [(0, 2), (2, 6), (6, 8)]
    assert user_tokens(prompt, [], offsets) == [False, True, True]


def test_a_record_that_does_not_match_is_not_trusted():
    prompt = Prompt("", "a<i>b", ((4, 5),), (0,))
    with pytest.raises(ModelError, match="rearranges"):
        user_tokens(prompt, [replacement(0, "<i>", 0, "###")], [(0, 1)])


def test_image_tokens_go_to_the_placeholder_they_came_from():
    """A placeholder becomes a run, tiles with text in between, or nothing; offsets may have a
    neighbouring space."""
    replaced = [{"new_span": span} for span in ((4, 10), (10, 30), (33, 39), (50, 50))]
    one, tiles, spaced = [(4, 7), (7, 10)], [(12, 15), (20, 23), (26, 29)], [(32, 36), (36, 40)]
    assert placeholder_tokens(replaced, [*one, *tiles, *spaced]) == [2, 3, 2, 0]
    assert placeholder_tokens(replaced, tiles) == [0, 3, 0, 0]
    assert placeholder_tokens([], one) == []


@pytest.mark.parametrize(
    ("turns", "places"),
    [
        ([("user", 1, "a", 0)], (1, 0)),
        ([("system", "s"), ("user", 0), ("assistant", "x"), ("user", 1)], (0,)),
        ([("user", "words")], ()),
    ],
)
def test_images_of_the_prompt_are_those_before_the_first_answer(turns, places):
    assert sample(*turns).prompt_images == places


def test_first_tokens_of_earlier_answers():
    prompt = Prompt("", "a<i>bc:dd:e", (), (0,), ((7, True), (10, False)))
    grown = [replacement(1, "<i>", 1, "#####")]
    #          bos      a       image   bc      :        dd        :         e        pad
    offsets = [(0, 0), (0, 1), (1, 6), (6, 8), (8, 9), (9, 11), (11, 12), (12, 13), (0, 0)]
    assert answer_tokens(prompt, grown, offsets) == [5, 7]
    glued = [*offsets[:4], (8, 11), *offsets[6:]]
    assert answer_tokens(prompt, grown, glued) is None, "the first answer begins inside of a token"


ANSWERING = "{{ 'ASSISTANT' if m.role == 'assistant' else m.role }}:" + LOOP % "c.text"


def talk(*roles: str) -> Sample:
    """A turn for each role; the first question has the picture."""
    turns = [Turn(role, (TextPart(f"{role}{i}"),)) for i, role in enumerate(roles)]
    picture = roles.index("user")
    turns[picture] = Turn("user", (ImagePart(0), *turns[picture].parts))
    return Sample(0, "id", (Image.new("RGB", (2, 2)),), tuple(turns))


def test_answers_in_one_prompt():
    found = write_answers(
        Family("test"), Processor(ANSWERING), talk("user", "assistant", "user", "assistant"), ()
    )
    assert found is not None
    ((place, looked_at),) = found.earlier
    assert looked_at
    assert "user0" in found.laid_out[:place]
    assert found.laid_out[place:].lstrip().startswith("assistant1")
    assert [found.laid_out[a:b] for a, b in found.user] == ["user0", "user2"]


def test_a_template_that_rewrites_earlier_turns_needs_a_prompt_for_each():
    sample = talk("user", "assistant", "user", "assistant")
    processor = Processor("{{ loop.length }}" + ANSWERING)
    assert write_answers(Family("test"), processor, sample, ()) is None
    first, second = write_apart(Family("test"), processor, sample, ())
    assert [first.laid_out[a:b] for a, b in first.user] == ["user0"]
    assert [second.laid_out[a:b] for a, b in second.user] == ["user2"], "since the answer before"


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("user", "assistant"), [("user0", "assistant1", 1)]),
        (("user",), [("user0", "", 1)]),
        (
            ("system", "user", "assistant", "user", "user", "assistant", "assistant", "user"),
            [
                ("user1", "assistant2", 1),
                ("user3\nuser4", "assistant5", 2),
                ("", "assistant6", 3),
            ],
        ),
    ],
)
def test_what_each_answer_answers(roles, expected):
    asked = talk(*roles).asked
    assert [(each.prompt, each.answer, each.turn) for each in asked] == expected
    assert asked[0].prompt_turns == talk(*roles).prompt_turns


def test_answers_before_the_picture_or_without_words_are_not_asked_for():
    turns = (
        Turn("user", (TextPart("hi"),)),
        Turn("assistant", (TextPart("hello"),)),
        Turn("user", (ImagePart(0), TextPart("what?"))),
        Turn("assistant", (TextPart(" "),)),
        Turn("assistant", (TextPart("a cat"),)),
    )
    (only,) = Sample(0, "id", (Image.new("RGB", (2, 2)),), turns).asked
    assert (only.turn, only.answer) == (3, "a cat")
