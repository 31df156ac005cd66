"""Two looks that share their picture features see what two separate looks see, in every family."""

from __future__ import annotations

import pytest
import torch

from gazeguard.cleaning.tower import recording, replaying, shared_towers
from gazeguard.lab import tiny
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.probe.attention import attend

ADAPTED = r".*(language_model|text_model).*\.q_proj"
families = pytest.mark.parametrize("family", tiny.FAMILIES)


def adapted(folder, out, modules=ADAPTED, **options) -> Target:
    """The folder's model with a random LoRA adapter."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False, **options)
    get_peft_model(model, config).save_pretrained(out)
    return load(folder, out)


@families
def test_replayed_pictures_give_the_same_rows(tiny_folder, samples, tmp_path, family):
    target = adapted(tiny_folder(family), tmp_path)
    encoded = target.encode(samples)
    towers = shared_towers(target, None)
    assert towers is not None, "the adapter leaves the tower alone"
    with target.without_adapter():
        expected = attend(target, encoded).weights
    pictures: list[object] = []
    with recording(towers[0], pictures):
        tuned = attend(target, encoded).weights
    assert pictures, "the tower was not run through its own forward"
    ran = []
    hook = next(towers[1].children()).register_forward_hook(lambda *_: ran.append(1))
    with target.without_adapter(), replaying(towers[1], pictures):
        assert torch.equal(attend(target, encoded).weights, expected)
    assert not ran, "the tower was computed a second time"
    hook.remove()
    assert torch.equal(attend(target, encoded).weights, tuned), "the block left something behind"
    assert not torch.equal(tuned, expected), "the adapter does something"


@pytest.mark.parametrize(
    "options",
    [
        {"modules": r".*(language_model|vision_tower).*\.q_proj"},
        {"modules_to_save": ["vision_tower"]},
    ],
)
def test_an_adapter_in_the_tower_forbids_sharing(tiny_folder, tmp_path, options):
    assert shared_towers(adapted(tiny_folder("llava"), tmp_path, **options), None) is None


def test_two_models_share_only_equal_towers(tiny_folder):
    one, other = load(tiny_folder("llava")), load(tiny_folder("llava"))
    assert shared_towers(one, other) is not None
    with torch.no_grad():
        next(other.base.model.vision_tower.parameters()).add_(1e-3)
    assert shared_towers(one, other) is None
