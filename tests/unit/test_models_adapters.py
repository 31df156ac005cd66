"""LoRA adapters: every tensor lands, or the adapter is refused."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gazeguard.errors import ModelError
from gazeguard.lab import tiny
from gazeguard.models.fingerprint import fingerprint
from gazeguard.models.load import load
from gazeguard.probe.attention import attend
from gazeguard.types import ImagePart, Sample, TextPart, Turn


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(root):
    return tiny.build("llava", root / "base")


def make_adapter(base, out, seed=0, **options):
    """An adapter with random weights, as fine-tuning would save it."""
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(load(base).model, peft.LoraConfig(**settings | options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(0.0, 0.3)
    model.save_pretrained(out)
    return model


@pytest.fixture(scope="module")
def built(base, root):
    """LoRA beside a fully tuned projector."""
    make_adapter(base, root / "adapter", modules_to_save=["multi_modal_projector"])
    return root / "adapter"


@pytest.fixture
def adapter(built, tmp_path):
    return shutil.copytree(built, tmp_path / "adapter")


def change(folder, edit):
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refused(base, adapter, match):
    with pytest.raises(ModelError, match=match) as caught:
        load(base, adapter)
    assert "\n" not in str(caught.value)


sample = Sample(
    0,
    "id",
    (Image.effect_noise((40, 40), 60).convert("RGB"),),
    (Turn("user", (ImagePart(0), TextPart("why?"))),),
)


def test_adapter_and_projector_are_used(base, root):
    tuned = make_adapter(base, root / "used", modules_to_save=["multi_modal_projector"]).eval()
    bare, target = load(base), load(base, root / "used")
    encoded = target.encode([sample])
    with torch.no_grad():
        expected = tuned(**encoded.inputs).logits
        assert torch.allclose(target.model(**encoded.inputs).logits, expected, atol=1e-5)
        assert not torch.allclose(bare.model(**encoded.inputs).logits, expected, atol=1e-2)
    assert not target.model.training
    rows, plain = attend(target, encoded), attend(bare, encoded)
    assert rows.layers == (0, 1, 2, 3)
    assert not torch.allclose(rows.weights, plain.weights, atol=1e-3)
    theirs = fingerprint(target)
    assert theirs["id"] != fingerprint(bare)["id"]
    assert theirs["adapter"]["weights"].keys() == {"adapter_model.safetensors"}


def test_every_linear_layer(base, root):
    make_adapter(base, root / "all", target_modules="all-linear")
    load(base, root / "all")


def test_causal_lm_adapter(base, root):
    make_adapter(base, root / "task", task_type="CAUSAL_LM")
    target = load(base, root / "task")
    assert attend(target, target.encode([sample])).finite.all()


def test_missing_tensor(base, adapter):
    change(adapter, lambda w: w.pop(next(k for k in w if "lora_B" in k)))
    refused(base, adapter, "lacks 1 tensors")


def test_missing_projector(base, adapter):
    change(adapter, lambda w: w.pop(next(k for k in w if "projector" in k)))
    refused(base, adapter, "does not fit|lacks")


def test_left_over_tensor(base, adapter):
    change(adapter, lambda w: w.update({"base_model.model.other.lora_A.weight": torch.ones(2, 2)}))
    refused(base, adapter, "1 tensors without a place")


def test_tensor_of_the_base_model(base, adapter):
    """It would land, but in the base and behind the adapter's back."""
    own = load(base).model.lm_head.weight
    change(adapter, lambda w: w.update({"base_model.model.lm_head.weight": own.clone()}))
    refused(base, adapter, "without a place")


def test_renamed_tensors(base, adapter):
    """Keys of an older model layout: peft would warn and go on with the bare base."""

    def rename(weights):
        for key in list(weights):
            weights[key.replace("language_model", "old_language_model")] = weights.pop(key)

    change(adapter, rename)
    refused(base, adapter, "lacks|does not fit")


def test_wrong_shape(base, adapter):
    def cut(weights):
        key = next(k for k in weights if "lora_A" in k)
        weights[key] = weights[key][:, :-1].contiguous()

    change(adapter, cut)
    refused(base, adapter, "does not fit")


def test_no_tensors(base, adapter):
    change(adapter, lambda w: w.clear())
    refused(base, adapter, r"lacks|does not fit|no tensors")


def test_adapter_of_another_base(base, adapter, root):
    other = tiny.build("llava", root / "other", seed=1)
    refused(other, adapter, f"was trained on {base}")
    family = tiny.build("gemma3", root / "gemma3")
    refused(family, adapter, "was trained on")
    forgotten = json.loads((adapter / "adapter_config.json").read_text())
    forgotten["base_model_name_or_path"] = "/no/longer/there"
    (adapter / "adapter_config.json").write_text(json.dumps(forgotten))
    refused(family, adapter, "does not fit|lacks")


def test_copy_of_the_base_is_the_base(base, adapter, tmp_path):
    load(shutil.copytree(base, tmp_path / "moved"), adapter)


def test_broken_adapter_folders(base, adapter, tmp_path):
    refused(base, tmp_path / "nowhere", "no folder")
    refused(base, tmp_path, r"no adapter_config\.json")
    (adapter / "adapter_config.json").write_text("{}")
    refused(base, adapter, "adapter_config.json")


def test_broken_adapter_weights(base, adapter):
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:50])
    refused(base, adapter, "not a readable safetensors file")
    file.rename(adapter / "adapter_model.bin")
    refused(base, adapter, "pickled")


def test_prompt_tuning_is_refused(base, adapter):
    """It would put tokens into the prompt that spans do not know."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}))
    refused(base, adapter, "give a LoRA adapter")


def test_adapter_given_as_model(adapter):
    with pytest.raises(ModelError, match="base model first"):
        load(adapter)
