"""Finding the user's words in a rendered prompt, with templates of many habits."""

from __future__ import annotations

import pytest
from PIL import Image

from gazeguard.errors import ModelError, RowError
from gazeguard.models.family import Family
from gazeguard.models.spans import Prompt, placeholder_tokens, user_tokens, write_prompt
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
