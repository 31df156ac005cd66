"""LoRA adapters: every tensor lands, or the adapter is refused."""

from __future__ import annotations

import json
import re
import shutil

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gazeguard.assets import ADAPTER, BASE
from gazeguard.errors import MeasurementError, ModelError
from gazeguard.lab import tiny, tiny_encoders
from gazeguard.models.encoders.load import load_encoder
from gazeguard.models.fingerprint import fingerprint
from gazeguard.models.load import load
from gazeguard.probe.attention import attend
from gazeguard.scanning.models import kind_of
from gazeguard.types import ImagePart, Sample, TextPart, Turn


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(root):
    return tiny.build("llava", root / "base")


WEIGHTS = "model.safetensors"


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


def configure(folder, file="adapter_config.json", **settings):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(base, adapter, match):
    with pytest.raises(ModelError, match=match) as caught:
        load(base, adapter)
    said = str(caught.value)
    assert "\n" not in said
    assert "lora_A" not in said.replace(str(adapter), ""), "no tensor names for users"


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
    refused(
        base, adapter, r"lacks 1 tensor of the language model, of \d+ .* copy the adapter again"
    )


def test_missing_projector(base, adapter):
    change(adapter, lambda w: w.pop(next(k for k in w if "projector" in k)))
    refused(base, adapter, "lacks 1 tensor of the projector")


def test_left_over_tensor(base, adapter):
    change(adapter, lambda w: w.update({"base_model.model.other.lora_A.weight": torch.ones(2, 2)}))
    refused(base, adapter, "holds 1 tensor of the language model without a place")


def test_tensor_of_the_base_model(base, adapter):
    """It would land, but in the base and behind the adapter's back."""
    own = load(base).model.lm_head.weight
    change(adapter, lambda w: w.update({"base_model.model.lm_head.weight": own.clone()}))
    refused(base, adapter, "without a place")


def test_names_of_no_known_layout(base, adapter):
    """peft would warn and go on with the bare base."""

    def rename(weights):
        for key in list(weights):
            weights[key.replace("language_model", "old_language_model")] = weights.pop(key)

    change(adapter, rename)
    refused(base, adapter, "lacks 16 .* ask for, and it holds 16 .* without a place")


def test_wrong_shape(base, adapter):
    def cut(weights):
        key = next(k for k in weights if "lora_A" in k)
        weights[key] = weights[key][:, :-1].contiguous()

    change(adapter, cut)
    refused(base, adapter, "1 tensor of the language model for layers of another size")


def test_no_tensors(base, adapter):
    change(adapter, lambda w: w.clear())
    refused(base, adapter, "holds no tensors")


def test_adapter_of_another_base(base, adapter, root):
    other = tiny.build("llava", root / "other", seed=1)
    refused(other, adapter, f"was trained on {base}")
    family = tiny.build("gemma3", root / "gemma3")
    refused(family, adapter, "was trained on")
    forgotten = json.loads((adapter / "adapter_config.json").read_text())
    forgotten["base_model_name_or_path"] = "/no/longer/there"
    (adapter / "adapter_config.json").write_text(json.dumps(forgotten))
    refused(family, adapter, "does not fit .* use the base model it was trained on, which it calls")


def test_copy_of_the_base_is_the_base(base, adapter, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    load(moved, adapter)
    weights = {name: value.half() for name, value in load_file(moved / WEIGHTS).items()}
    save_file(weights, moved / WEIGHTS, metadata={"format": "pt"})
    load(moved, adapter)


@pytest.fixture(scope="module")
def shipped():
    """The shipped base and adapter, and the attention rows of the two."""
    base, adapter = BASE, ADAPTER
    target = load(base, adapter)
    return base, adapter, attend(target, target.encode([sample])).weights


def told_names(change):
    """The shipped adapter with other names for its tensors."""

    def renamed(adapter, out):
        shutil.copytree(adapter, out)
        file = out / "adapter_model.safetensors"
        weights = {change(name): value for name, value in load_file(file).items()}
        assert weights.keys() != load_file(file).keys()
        save_file(weights, file, metadata={"format": "pt"})
        return out

    return renamed


def before_4_52(name):
    moved = name.replace("model.model.language_model.", "model.language_model.model.")
    return moved.replace("model.model.multi_modal", "model.multi_modal")


def of_the_llava_repository(name):
    for new, old in (
        ("model.model.language_model.", "model.model."),
        ("multi_modal_projector.linear_1", "mm_projector.0"),
        ("multi_modal_projector.linear_2", "mm_projector.2"),
    ):
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize(
    "change",
    [
        before_4_52,
        of_the_llava_repository,
        lambda name: name.removeprefix("base_model.model."),
        lambda name: before_4_52(name).removeprefix("base_model.model."),
        lambda name: re.sub(r"(lora_[AB])\.", r"\1.lora.", name),
        lambda name: name.replace("projector.", "projector.modules_to_save.lora."),
    ],
    ids=["4.51", "LLaVA", "no prefix", "4.51 without prefix", "named", "named projector"],
)
def test_other_names_of_the_same_tensors(shipped, change, tmp_path):
    base, adapter, rows = shipped
    target = load(base, told_names(change)(adapter, tmp_path / "renamed"))
    assert torch.equal(attend(target, target.encode([sample])).weights, rows)


def test_settings_that_name_modules_where_they_were(shipped, tmp_path):
    base, adapter, rows = shipped
    for name, change, settings in (
        (
            "older",
            before_4_52,
            {"target_modules": r"language_model\.model\.layers.*(q|k|v|o|gate|up|down)_proj"},
        ),
        (
            "llava",
            of_the_llava_repository,
            {
                "target_modules": [f"{part}_proj" for part in (*"qkvo", "gate", "up", "down")],
                "modules_to_save": ["mm_projector"],
            },
        ),
    ):
        folder = told_names(change)(adapter, tmp_path / name)
        configure(folder, **settings)
        target = load(base, folder)
        assert torch.equal(attend(target, target.encode([sample])).weights, rows), name


def test_two_adapters_in_one_file(base, adapter):
    def twice(weights):
        for name in [name for name in weights if "lora_" in name]:
            value = weights.pop(name)
            for own in ("first", "second"):
                weights[re.sub(r"(lora_[AB])\.", rf"\1.{own}.", name)] = value.clone()

    change(adapter, twice)
    refused(base, adapter, r"several adapters in one file \(first, second\)")


def test_rank_of_the_tensors_and_of_the_settings(base, adapter):
    configure(adapter, r=1)
    refused(base, adapter, "rank 2 and its adapter_config.json says 1; copy both")


def test_an_adapter_that_changes_nothing(base, root, tmp_path):
    make_adapter(base, tmp_path / "idle", init_lora_weights=True)
    change(tmp_path / "idle", lambda w: w.update({k: v * ("A" in k) for k, v in w.items()}))
    with pytest.raises(MeasurementError, match="changes nothing on .* B matrices are zero"):
        load(base, tmp_path / "idle")

    # With the projector along that only is the base's own, then with one that was tuned.
    own = load(base).model.state_dict()
    make_adapter(base, tmp_path / "both", modules_to_save=["multi_modal_projector"])
    saved = load_file(tmp_path / "both" / "adapter_model.safetensors")
    change(tmp_path / "both", lambda w: w.update({k: v * 0 for k, v in w.items() if "lora_B" in k}))
    load(base, tmp_path / "both")
    copied = {k: own[k.removeprefix("base_model.model.")] for k in saved if "projector" in k}
    change(tmp_path / "both", lambda w: w.update(copied))
    with pytest.raises(MeasurementError, match="changes nothing"):
        load(base, tmp_path / "both")


@pytest.mark.parametrize(
    ("named", "own", "told"),
    [
        ("llava-hf/llava-1.5-7b-hf", None, "cannot be told"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf", "was trained on"),
        ("llava-hf/llava-1.5-7b-hf", "mirror/LLaVA-1.5-7B-hf", ""),
        ("/home/somebody/llava", None, ""),
        ("gazeguard-lab-base", None, ""),
        (None, None, ""),
    ],
)
def test_the_base_that_an_adapter_names(base, adapter, tmp_path, caplog, named, own, told):
    """Names and paths differ for the same weights: a fault only where both names are known."""
    moved = shutil.copytree(base, tmp_path / "moved")
    configure(moved, "config.json", _name_or_path=own)
    configure(adapter, base_model_name_or_path=named)
    if told == "was trained on":
        refused(moved, adapter, told)
        return
    load(moved, adapter)
    assert [told in record.message for record in caplog.records] == [True] * bool(told)


def test_an_adapter_for_a_text_encoder(base, tmp_path):
    encoder = load_encoder(tiny_encoders.build("clip-text", tmp_path / "clip")).model
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(encoder, config).save_pretrained(tmp_path / "lora")
    refused(base, tmp_path / "lora", r"for a text encoder, .*merge_and_unload")
    with pytest.raises(ModelError, match="for a text encoder"):
        kind_of(str(tmp_path / "lora"))
    # As saved from the layout before transformers 5, without the class that it is for.
    old = "base_model.model.text_model.encoder"
    change(
        tmp_path / "lora",
        lambda w: [w.update({k.replace("base_model.model.encoder", old): w.pop(k)}) for k in [*w]],
    )
    configure(tmp_path / "lora", auto_mapping=None)
    refused(base, tmp_path / "lora", "for a text encoder")


def test_a_model_with_an_adapter_beside_it(base, adapter, tmp_path):
    """transformers would put it on without a word."""
    both = shutil.copytree(base, tmp_path / "both")
    for file in adapter.iterdir():
        shutil.copy(file, both)
    with pytest.raises(ModelError, match="holds an adapter beside the model"):
        load(both)
    load(base, both)  # what peft takes from there


def test_an_adapter_with_the_config_of_its_base(base, adapter):
    """As trainers leave it; still an adapter."""
    shutil.copy(base / "config.json", adapter)
    with pytest.raises(ModelError, match="base model first"):
        load(adapter)
    load(base, adapter)


def test_weights_that_were_not_loaded_are_named(base, adapter, tmp_path, caplog):
    moved = shutil.copytree(base, tmp_path / "moved")
    for name in (
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "optimizer.pt",
        "training_args.bin",
    ):
        (moved / name).write_bytes(b"")
    (adapter / "non_lora_trainables.bin").write_bytes(b"")
    load(moved, adapter)
    said = [record.message for record in caplog.records]
    assert len(said) == 2, said
    assert said[0].endswith("model.fp16.safetensors, pytorch_model.bin.")
    assert said[1].endswith("not looked at: non_lora_trainables.bin.")


def test_broken_adapter_folders(base, adapter, tmp_path):
    refused(base, tmp_path / "nowhere", "no folder")
    refused(base, tmp_path, r"no adapter_config\.json: give .*adapter\.")
    refused(base, tmp_path / "adapter" / "..", rf"give {adapter}")
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


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"some_future_option": 3, "peft_version": "0.99.0"},
        {"lora_alpha": 320},
    ],
    ids=["rslora", "newer peft", "alpha"],
)
def test_settings_that_fit(base, adapter, settings):
    configure(adapter, **settings)
    load(base, adapter)


def test_half_precision(base, adapter):
    change(adapter, lambda w: w.update({name: value.half() for name, value in w.items()}))
    load(base, adapter)


def test_settings_without_weights(base, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    refused(base, adapter, r"holds no adapter_model\.safetensors")
