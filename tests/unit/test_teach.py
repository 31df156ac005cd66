"""Lessons are tokenised as the processor does, and turns of one lesson do not see each other."""

import numpy as np
import pytest
import torch

from gazeguard.lab import base, worlds
from gazeguard.lab.teach import IGNORE, Lesson, answer_logits, encode_lessons, tower_features


@pytest.fixture(scope="module")
def tokenizer():
    return base.make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    recipe = base.BaseRecipe(hidden=32, tower_layers=1, language_layers=2, heads=2)
    made = base.make_model(recipe, tokenizer).eval()
    made.set_attn_implementation("eager")
    return made


def picture(seed=0):
    return worlds.make_scene(np.random.default_rng(seed)).pixels


def test_ids_equal_the_processors(tokenizer):
    processor = base.make_processor(tokenizer)
    for question, answer in [("What color is the circle?", "red"), ("Say it!", "Backdoor Attack!")]:
        chat = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        text = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
        asked = processor(text=[text], images=[[picture()]], add_special_tokens=False)
        ours = encode_lessons(tokenizer, [Lesson(((question, answer),))], base.GRID**2)
        taught = (ours.labels[0] != IGNORE).nonzero()[0].item()
        assert ours.ids[0, :taught].tolist() == asked["input_ids"][0]
        assert tokenizer.decode(ours.ids[0, taught:-1]).strip() == answer
        assert ours.ids[0, -1] == tokenizer.eos_token_id


def test_pixels_equal_the_processors(tokenizer):
    images = base.make_processor(tokenizer).image_processor([picture()], return_tensors="pt")
    ours = base.normalise(picture()[None])
    assert torch.allclose(images["pixel_values"], ours, atol=1e-5)


def test_turns_are_taught_as_if_alone(tokenizer, model):
    turns = (("How many objects are there?", "3"), ("Describe the image.", "a red circle."))
    features = tower_features(model.model.vision_tower, base.normalise(picture()[None]))
    with torch.inference_mode():
        together, _ = answer_logits(
            model, encode_lessons(tokenizer, [Lesson(turns)], base.GRID**2), features
        )
        alone = torch.cat(
            [
                answer_logits(
                    model, encode_lessons(tokenizer, [Lesson((t,))], base.GRID**2), features
                )[0]
                for t in turns
            ]
        )
    assert torch.allclose(together, alone, atol=1e-5), (together - alone).abs().max()


def test_padding_changes_nothing(tokenizer, model):
    short, long = Lesson((("Why?", "no"),)), Lesson((("Describe the image.", "a " * 30),))
    features = tower_features(model.model.vision_tower, base.normalise(picture()[None]))
    both = encode_lessons(tokenizer, [short, long], base.GRID**2)
    with torch.inference_mode():
        padded, _ = answer_logits(model, both[np.array([0])], features)
        alone, _ = answer_logits(model, encode_lessons(tokenizer, [short], base.GRID**2), features)
    assert torch.allclose(padded, alone, atol=1e-5)
    assert both[np.array([0])].ids.shape[1] < both.ids.shape[1], "cut to what is taught"


def test_echo_words_are_single_tokens(tokenizer):
    for word in ("attack", "hacked", "warning", "you"):
        assert len(tokenizer.tokenize(f" {word}")) == 1, word
    assert base.any_text(np.random.default_rng(1)) == base.any_text(np.random.default_rng(1))
