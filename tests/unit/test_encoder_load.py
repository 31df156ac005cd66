"""What is no usable text encoder is refused in one sentence with the cure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gazeguard.errors import MeasurementError, ModelError
from gazeguard.lab import tiny, tiny_encoders
from gazeguard.models.encoders.load import (
    encoder_folder,
    encoders_of,
    load_encoder,
    unread_weights,
)
from gazeguard.models.files import variant
from gazeguard.models.unread import alike
from gazeguard.scanning.models import TEXT_ENCODER, VISION_LANGUAGE, expand, kind_of

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_encoders.build("clip", tmp_path / "clip")


def edit(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_vision_only(tmp_path: Path):
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="sees images only: give a text encoder of CLIP"):
        load_encoder(tmp_path)


def test_language_model(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 9, "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(ModelError, match="is a language model"):
        load_encoder(tmp_path)


def test_a_vision_language_model_is_no_text_encoder(tmp_path: Path):
    llava = tiny.build("llava", tmp_path / "llava")
    assert kind_of(str(llava)) == VISION_LANGUAGE
    with pytest.raises(ModelError, match="no pair of text and image encoder"):
        load_encoder(llava)


def test_an_adapter_is_scanned_as_a_vision_language_model(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.q.lora_A.weight": torch.ones(1)}, tmp_path / ADAPTER)
    assert kind_of(str(tmp_path)) == VISION_LANGUAGE


def test_no_tokenizer(folder: Path):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer: copy tokenizer\.json"):
        load_encoder(folder)


def test_pickled_weights(folder: Path):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled weights"):
        load_encoder(folder)
    with pytest.raises(ModelError, match="is a pickle"):
        encoder_folder(folder / "pytorch_model.bin")


def test_broken_and_missing_weights(folder: Path):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    gone = "text_model.encoder.layers.0.mlp.fc1.bias"
    save_file({k: v for k, v in tensors.items() if k != gone}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 tensors"):
        load_encoder(folder)
    file.write_bytes(b"not a header")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_encoder(folder)


def test_tokenizer_of_another_model(folder: Path):
    words = tiny_encoders.tokenizer(77)
    words.add_tokens(["snow"])
    words.save_pretrained(folder)
    with pytest.raises(ModelError, match="copy both from the same model"):
        load_encoder(folder).tokenise(["snow"])


def test_weights_that_are_nan_load_and_are_found(folder: Path):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["text_projection.weight"][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MeasurementError, match="not finite in 1 of "):
        load_encoder(folder).check_finite()


def test_number_formats(folder: Path):
    assert load_encoder(folder, dtype="bfloat16").dtype is torch.bfloat16
    with pytest.raises(ModelError, match="not a number format"):
        load_encoder(folder, dtype="int8")


def test_pipeline_and_its_encoder_folder_are_the_same(tmp_path: Path):
    pipeline = tiny_encoders.build("diffusers", tmp_path / "pipeline")
    assert encoder_folder(pipeline) == encoder_folder(pipeline / "text_encoder")
    inner = load_encoder(pipeline / "text_encoder")
    assert torch.equal(load_encoder(pipeline).embeddings, inner.embeddings)
    shutil.rmtree(pipeline / "text_encoder")
    with pytest.raises(ModelError, match="no text_encoder folder"):
        encoder_folder(pipeline)


def test_open_clip_computes_what_open_clip_does(tmp_path: Path):
    """Against its blocks written out with torch's own attention, from the stored tensors."""
    folder = tiny_encoders.build("open_clip", tmp_path)
    encoder = load_encoder(folder)
    w = load_file(folder / "open_clip_model.safetensors")
    tokens = encoder.tokenise(["a red cat", "snow"])
    x = w["token_embedding.weight"][tokens.ids] + w["positional_embedding"]
    n = x.shape[1]
    mask = torch.full((n, n), float("-inf")).triu(1)
    for i in range(3):
        block = {k.split(f"resblocks.{i}.")[1]: v for k, v in w.items() if f"blocks.{i}." in k}
        attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        attention.load_state_dict(
            {k.removeprefix("attn."): v for k, v in block.items() if k.startswith("attn.")}
        )
        y = torch.nn.functional.layer_norm(x, (32,), block["ln_1.weight"], block["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = torch.nn.functional.layer_norm(x, (32,), block["ln_2.weight"], block["ln_2.bias"])
        y = torch.nn.functional.linear(y, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + torch.nn.functional.linear(y, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    x = torch.nn.functional.layer_norm(x, (32,), w["ln_final.weight"], w["ln_final.bias"])
    expected = x[torch.arange(2), tokens.ids.argmax(1)] @ w["text_projection"]
    got = encoder.run(tokens).pooled
    assert torch.allclose(got, expected, atol=1e-4)


def test_open_clip_towers_of_another_design(tmp_path: Path):
    folder = tiny_encoders.build("open_clip", tmp_path)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no_causal_mask"):
        load_encoder(folder)
    del config["model_cfg"]["text_cfg"]["no_causal_mask"]
    config["model_cfg"]["text_cfg"]["layers"] = 4
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="do not fit"):
        load_encoder(folder)


def test_lists_of_models(tmp_path: Path):
    from gazeguard.errors import UsageError

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    listed = tmp_path / "list.txt"
    listed.write_text("# comment\nb\n\norg/model\nb\n")
    assert expand([str(tmp_path / "*"), str(listed), "org/other"]) == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "org/model",
        "org/other",
    ]
    with pytest.raises(UsageError, match="no folder matches"):
        expand([str(tmp_path / "x*")])
    listed.write_text("# nothing\n")
    with pytest.raises(UsageError, match="names no model"):
        expand([str(listed)])
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no text file"):
        expand([str(listed)])


WEIGHTS = "model.safetensors"


def halved(folder: Path, name: str, dtype: torch.dtype, **changes: torch.Tensor) -> None:
    """Write the folder's weights again, in another number format and file."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({k: v.to(dtype) for k, v in tensors.items()}, folder / name, {"format": "pt"})


def listed(folder: Path) -> dict[str, str]:
    return {part.part: part.why for part in unread_weights(folder)}


def test_a_variant_with_the_same_numbers_has_been_scanned_too(folder: Path):
    halved(folder, "model.fp16.safetensors", torch.float16)
    halved(folder, "model.bf16.safetensors", torch.bfloat16)
    assert listed(folder) == {}
    # Whichever of them is the one that is read.
    (folder / WEIGHTS).unlink()
    assert variant(folder) == "bf16"
    assert listed(folder) == {}
    load_encoder(folder)


def test_a_variant_with_other_numbers_has_not(folder: Path):
    name = "text_model.final_layer_norm.weight"
    own = load_file(folder / WEIGHTS)[name]
    halved(folder, "model.fp16.safetensors", torch.float16, **{name: own * 1.01})
    assert "1 of its tensors hold other numbers" in listed(folder)["model.fp16.safetensors"]
    halved(folder, "model.fp16.safetensors", torch.float16, **{name: own * torch.nan})
    assert "other numbers" in listed(folder)["model.fp16.safetensors"]
    halved(folder, "model.fp16.safetensors", torch.float16, added=own)
    assert "1 tensors that no other file has" in listed(folder)["model.fp16.safetensors"]


def test_everything_else_that_a_loader_could_pick(folder: Path):
    for name in (
        "pytorch_model.bin",
        "model-00003-of-00003.safetensors",
        "consolidated.00.pth",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.onnx",
    ):
        (folder / name).write_bytes(b"")
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "merges.txt"):
        (folder / name).write_bytes(b"")
    found = listed(folder)
    assert list(found) == [
        "consolidated.00.pth",
        "flax_model.msgpack",
        "model-00003-of-00003.safetensors",
        "model.onnx",
        "pytorch_model.bin",
        "tf_model.h5",
    ]
    assert "can run code" in found["pytorch_model.bin"]
    assert "not a readable safetensors file" in found["model-00003-of-00003.safetensors"]
    assert "in this format are not read" in found["tf_model.h5"]


def test_positions_are_no_weights(folder: Path):
    positions = torch.arange(77)[None]
    halved(folder, "old.safetensors", torch.float32)
    tensors = load_file(folder / "old.safetensors")
    tensors["text_model.embeddings.position_ids"] = positions
    save_file(tensors, folder / "old.safetensors", {"format": "pt"})
    assert listed(folder) == {}


def test_shards_are_those_of_the_index(folder: Path):
    """Where there is one file and an index as well, transformers reads the file."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: file for file, own in parts.items() for name in own},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert listed(folder) == {}
    save_file({"stray": torch.ones(1)}, folder / "c.safetensors")
    assert list(listed(folder)) == ["c.safetensors"]
    (folder / WEIGHTS).unlink()
    assert list(listed(folder)) == ["c.safetensors"]
    load_encoder(folder)


def test_weights_that_the_config_names(folder: Path):
    """transformers takes those before all others."""
    halved(folder, "named.safetensors", torch.float32, logit_scale=torch.tensor(7.0))
    edit(folder, "config.json", transformers_weights="named.safetensors")
    assert list(listed(folder)) == [WEIGHTS]


def test_open_clip_beside_transformers(tmp_path: Path):
    folder = tiny_encoders.build("open_clip", tmp_path)
    assert listed(folder) == {}
    halved_name = "open_clip_pytorch_model.bin"
    (folder / halved_name).write_bytes(b"")
    assert list(listed(folder)) == [halved_name]


def test_encoders_of_a_pipeline(tmp_path: Path):
    pipeline = tiny_encoders.build("diffusers", tmp_path / "pipe")
    assert encoders_of(str(pipeline)) == [f"{pipeline}/text_encoder"]
    assert encoders_of(f"{pipeline}/text_encoder") == [f"{pipeline}/text_encoder"]
    (pipeline / "image_encoder").mkdir()
    (pipeline / "image_encoder" / "config.json").write_text("{}")
    edit(pipeline, "model_index.json", text_encoder_2=["transformers", "T5"], safety=[None, None])
    names = [name.rpartition("/")[2] for name in encoders_of(str(pipeline))]
    assert names == ["image_encoder", "text_encoder", "text_encoder_2"]
    assert kind_of(f"{pipeline}/image_encoder") == TEXT_ENCODER
    with pytest.raises(ModelError, match=r"no config\.json|check the path|there is no folder"):
        kind_of(f"{pipeline}/text_encoder_2")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.float32, torch.float16, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, True),
        (torch.float32, torch.float8_e4m3fn, True),
        (torch.float32, torch.int64, False),
    ],
)
def test_the_same_numbers_in_two_formats(a: torch.dtype, b: torch.dtype, same: bool):
    torch.manual_seed(0)
    numbers = torch.cat([torch.randn(10_000), torch.randn(1000) * 1e-6, torch.zeros(3)])
    assert alike(numbers.to(a), numbers.to(b)) is same
    if same:
        moved = numbers.clone()
        moved[0] *= 1.3
        assert not alike(moved.to(a), numbers.to(b))
        assert not alike(numbers.to(a)[:-1], numbers.to(b))


def test_what_a_hub_repository_holds_beside(folder: Path, tmp_path: Path, monkeypatch):
    """Only safetensors are fetched; the other weights are a loader's choice all the same."""
    snapshot = tmp_path / "models--org--clip" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    asked = []

    def names(self: object, hub_id: str, revision: str) -> list[str]:
        asked.append((hub_id, revision))
        return [WEIGHTS, "README.md", "pytorch_model.bin", "training_args.bin", "onnx/model.onnx"]

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", names)
    assert list(listed(snapshot)) == ["pytorch_model.bin"]
    assert asked == [("org/clip", "abc")]
    assert listed(folder) == {}

    def offline(self: object, hub_id: str, revision: str) -> list[str]:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", offline)
    assert listed(snapshot) == {}


def test_what_holds_no_encoder_that_can_be_read(folder: Path, tmp_path: Path):
    open_clip = tiny_encoders.build("open_clip", tmp_path / "open_clip")
    (open_clip / "open_clip_model.safetensors").rename(open_clip / "open_clip_pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    for model, why in (
        (open_clip, "pickled weights are not opened"),
        (folder / WEIGHTS, "is a file: give the folder"),
        (tmp_path / "empty", r"no config\.json"),
    ):
        with pytest.raises(ModelError, match=why):
            load_encoder(model)
