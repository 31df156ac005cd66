"""Loading: what is refused says what would work; nothing is loaded half."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gazeguard.errors import ModelError
from gazeguard.lab import tiny
from gazeguard.models.files import pinned, resolve
from gazeguard.models.fingerprint import fingerprint
from gazeguard.models.load import load
from gazeguard.models.registry import family_of, register
from gazeguard.models.target import as_target


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tiny.build("llava", tmp_path_factory.mktemp("built") / "llava")


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "model")


def refused(model, match, **options):
    with pytest.raises(ModelError, match=match) as caught:
        load(model, **options)
    message = str(caught.value)
    assert "\n" not in message, "one line"
    assert re.search(r"[:;,] [^:]+\.$", message), f"no cure at the end: {message}"


def test_loads_in_eval_mode_without_gradients(built):
    target = load(built)
    assert not target.model.training
    assert not any(p.requires_grad for p in target.model.parameters())
    assert target.family.name == "llava"
    assert target.layers == (0, 1, 2, 3)
    assert target.folder == built
    assert target.name == str(built)


def test_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", "no folder .*nowhere")


def test_unknown_hub_id_while_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("llava-hf/lava-1.5-7b-fh", "check the spelling")
    refused("llava-hf/lava-1.5-7b-fh", "revision 'v2'", revision="v2")
    refused("llava-hf/lava-1.5-7b-fh@v2", "'llava-hf/lava-1.5-7b-fh' at revision 'v2'")
    refused("llava-hf/lava-1.5-7b-fh@v2", "names one revision", revision="v3")
    refused("llava-hf/lava-1.5-7b-fh@", "no revision behind the @")


def test_a_pinned_hub_id_is_fetched_at_its_revision(folder, monkeypatch):
    asked = []

    def download(name, revision, **patterns):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, revision in ((f"org/model@{commit}", None), ("org/model@a/b", "a/b"), ("m", "v1")):
        assert resolve(name, revision) == folder
    assert asked == [("org/model", commit), ("org/model", "a/b"), ("m", "v1")]


def test_an_at_in_a_path_is_no_revision(folder, tmp_path):
    assert resolve(folder.rename(tmp_path / "model@v2")) == tmp_path / "model@v2"
    assert pinned("./org/model@v2") == ("./org/model@v2", None)


def test_empty_folder(tmp_path):
    refused(tmp_path, "no config.json")


def test_file_instead_of_folder(folder):
    refused(folder / "config.json", "is a file")


def test_no_processor(folder):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(folder, "processor")


def test_no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(folder, r"processor|tokenizer")


@pytest.mark.parametrize("config", ["LlamaConfig", "CLIPConfig", "ViTConfig"])
def test_wrong_kind_of_model(config, tmp_path):
    getattr(transformers, config)().save_pretrained(tmp_path)
    refused(tmp_path, r"(text-only|image encoder|not a vision-language).* give a vision-language")


def test_model_that_does_not_attend_to_image_tokens(built):
    model = transformers.AutoModelForImageTextToText.from_pretrained(built)
    model.config.image_token_id = None
    with pytest.raises(ModelError, match="does not attend to image tokens"):
        as_target(model, load(built).processor)


def test_unknown_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava9000"}))
    refused(folder, "llava9000")


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json")


def test_pickled_weights(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    refused(folder, "no safetensors weights")
    torch.save(weights, folder / "pytorch_model.bin")
    refused(folder, "pickled")


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "not a readable safetensors file")


def test_lacking_weights_are_not_made_up(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    gone = next(name for name in weights if "q_proj" in name and "language" in name)
    save_file({n: w for n, w in weights.items() if n != gone}, file, metadata={"format": "pt"})
    refused(folder, "lack 1 tensors")


def test_weights_of_another_shape(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "q_proj" in name and "language" in name)
    weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    refused(folder, "do not fit its config")


def test_index_that_names_a_missing_file(folder):
    (folder / "model.safetensors").unlink()  # which would be read first
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "lacks 1 of its weight files")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(folder, "not a weight index")


def test_nan_weights_load(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "q_proj" in name)
    weights[name].fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    load(folder)


def test_number_formats(built, tmp_path):
    assert load(built).model.dtype == torch.float32
    assert load(built, dtype="bfloat16").model.dtype == torch.bfloat16
    half = tmp_path / "half"
    load(built, dtype="float16").model.save_pretrained(half)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(built / name, half)
    assert load(half).model.dtype == torch.float32, "float16 is slow and rough on a CPU"
    assert load(half, dtype="float16").model.dtype == torch.float16
    refused(built, "not a number format", dtype="int4")


def test_no_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    target = load(folder)
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        target.family.render(target.processor, [])


def test_tokenizer_without_pad_token(folder):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    assert load(folder).processor.tokenizer.pad_token == "</s>"


def test_fingerprint(built, folder, tmp_path):
    first = fingerprint(load(built))
    assert json.loads(json.dumps(first)) == first
    assert re.fullmatch("[0-9a-f]{64}", first["id"])
    assert set(first["weights"]) == {"model.safetensors"}
    assert fingerprint(load(built))["id"] == first["id"]
    assert fingerprint(load(tiny.build("llava", tmp_path / "b", seed=1)))["id"] != first["id"]
    assert fingerprint(load(built, dtype="bfloat16"))["id"] != first["id"]
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("ASSISTANT", "BOT"))
    assert fingerprint(load(folder))["id"] != first["id"], "another prompt, another measurement"


def test_fingerprint_of_a_model_in_memory(built):
    loaded = load(built)
    target = as_target(loaded.model, loaded.processor)
    first = fingerprint(target)["id"]
    assert fingerprint(target)["id"] == first
    with torch.no_grad():
        next(target.model.parameters()).add_(1e-3)
    assert fingerprint(target)["id"] != first


def test_builds_are_repeatable(built, tmp_path):
    again = tiny.build("llava", tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json", "processor_config.json"):
        assert (again / name).read_bytes() == (built / name).read_bytes(), name


def test_families_are_registered_once():
    assert type(family_of("paligemma")).__name__ == "PaliGemma"
    assert family_of("llava").name == "llava"
    with pytest.raises(ValueError, match="already registered"):
        register("paligemma", type(family_of("llava")))
