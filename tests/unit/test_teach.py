"""Lessons are tokenised as the processor does, and turns of one lesson do not see each other."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gazeguard.errors import ModelError
from gazeguard.lab import worlds
from gazeguard.lab.architectures import ARCHITECTURES, architecture_of
from gazeguard.lab.architectures.protocol import GRID, channels, project
from gazeguard.lab.base_recipe import BaseRecipe
from gazeguard.lab.teach import IGNORE, Lesson, answer_logits, encode_lessons
from gazeguard.lab.tower import normalise
from gazeguard.lab.vocabulary import any_text, make_tokenizer


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kind(request):
    return architecture_of(request.param)


@pytest.fixture(scope="module")
def tokenizer(kind):
    return make_tokenizer(kind)


@pytest.fixture(scope="module")
def model(kind, tokenizer):
    torch.manual_seed(0)
    recipe = BaseRecipe(hidden=32, tower_layers=1, language_layers=2, heads=2)
    made = kind.make_model(recipe, tokenizer).eval()
    made.set_attn_implementation("eager")
    return made


@pytest.fixture(scope="module")
def encode(kind, tokenizer):
    def lessons(*turns):
        return encode_lessons(tokenizer, kind.prompt, [Lesson(t) for t in turns], GRID**2)

    return lessons


def picture(seed=0):
    return worlds.make_scene(np.random.default_rng(seed)).pixels


CHATS = [
    ("What color is the circle?", "red"),
    ("Say it!", "Backdoor Attack!"),
    ("  two\nlines, and ümlauts ", "a small red circle at the top."),
]


@pytest.mark.parametrize(("question", "answer"), CHATS)
def test_ids_equal_the_processors(kind, tokenizer, encode, question, answer):
    processor = kind.make_processor(tokenizer)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]

    def ids(messages, **options):
        text = processor.apply_chat_template(messages, **options)
        made = processor(text=[text], images=[[picture()]], add_special_tokens=False)
        return made["input_ids"][0]

    ours = encode(((question, answer),))
    taught = (ours.labels[0] != IGNORE).nonzero()[0].item()
    assert ours.ids[0, :taught].tolist() == ids(chat[:1], add_generation_prompt=True)
    assert ours.ids[0].tolist() == ids(chat)[: ours.ids.shape[1]], "and with its answer"
    assert tokenizer.decode(ours.ids[0, taught:-1]).strip() == answer
    assert ours.ids[0, -1] == tokenizer.eos_token_id


def test_pixels_equal_the_processors(kind, tokenizer):
    images = kind.make_processor(tokenizer).image_processor([picture()], return_tensors="pt")
    ours = normalise(picture()[None])
    assert torch.allclose(images["pixel_values"], ours, atol=1e-5)


def test_image_tokens_equal_the_models(kind, model):
    images = normalise(np.stack([picture(0), picture(1)]))
    with torch.no_grad():
        features = kind.look(model, images)
        theirs = model.get_image_features(images).pooler_output
        ours = project(model, features)
    assert features.shape == (2, GRID**2, channels(model))
    theirs = torch.stack(theirs) if isinstance(theirs, (list, tuple)) else theirs
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_every_image_token_is_its_own_cell(kind, model):
    patches = model.config.vision_config.image_size, model.config.vision_config.patch_size
    size, patch = (n if isinstance(n, int) else n[0] for n in patches)
    side = size // patch
    place = torch.arange(side) // (side // GRID)
    cells = (place[:, None] * GRID + place[None]).flatten()  # which cell a patch lies in
    seen = torch.cat([torch.tensor([-1]), cells])[None, :, None].repeat(1, 1, 8)
    tower = SimpleNamespace(
        vision_tower=lambda images: SimpleNamespace(last_hidden_state=seen),
        pixel_shuffle=getattr(model.model, "pixel_shuffle", None),
    )
    features = kind.look(SimpleNamespace(model=tower, config=model.config), picture())
    assert (features == torch.arange(GRID**2)[None, :, None]).all()


def test_turns_are_taught_as_if_alone(kind, model, encode):
    turns = (("How many objects are there?", "3"), ("Describe the image.", "a red circle."))
    with torch.inference_mode():
        features = kind.look(model, normalise(picture()[None]))
        together, _ = answer_logits(model, encode(turns), features)
        alone = torch.cat([answer_logits(model, encode((t,)), features)[0] for t in turns])
    assert torch.allclose(together, alone, atol=1e-5), (together - alone).abs().max()


def test_padding_changes_nothing(kind, model, encode):
    short, long = (("Why?", "no"),), (("Describe the image.", "a " * 30),)
    both = encode(short, long)
    with torch.inference_mode():
        features = kind.look(model, normalise(picture()[None]))
        padded, _ = answer_logits(model, both[np.array([0])], features)
        alone, _ = answer_logits(model, encode(short), features)
    assert torch.allclose(padded, alone, atol=1e-5)
    assert both[np.array([0])].ids.shape[1] < both.ids.shape[1], "cut to what is taught"


def test_echo_words_are_single_tokens(tokenizer):
    for word in ("attack", "hacked", "warning", "you"):
        assert len(tokenizer.tokenize(f" {word}")) == 1, word
    assert any_text(np.random.default_rng(1)) == any_text(np.random.default_rng(1))


def test_what_the_lab_cannot_teach_is_refused():
    with pytest.raises(ModelError, match=r"a 'qwen2_vl' model: .* \(llava, internvl\)"):
        architecture_of("qwen2_vl")
