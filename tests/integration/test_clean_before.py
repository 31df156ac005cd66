"""The model before its fine-tune: an adapter switched off, or a second model given as the base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers as T
from peft import LoraConfig, get_peft_model

from gazeguard.cleaning import clean
from gazeguard.errors import UsageError
from gazeguard.lab import tiny

from .conftest import MakeData


@pytest.fixture(scope="module")
def adapter(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes what the model does."""
    import torch

    torch.manual_seed(0)
    model = T.LlavaForConditionalGeneration.from_pretrained(llava)
    config = LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q|k)_proj", init_lora_weights=False
    )
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_adapter_is_switched_off_for_the_second_look(
    llava: Path, adapter: Path, make_data: MakeData, tmp_path: Path
) -> None:
    data = make_data(6)
    plain = clean(llava, data, tmp_path / "plain").profile
    tuned = clean(llava, data, tmp_path / "tuned", adapter=adapter).profile
    assert plain.before is None
    assert tuned.before is not None
    for name, values in plain.signals.items():
        assert tuned.before[name] == pytest.approx(values, abs=1e-6), name
    assert not np.allclose(tuned.entropy, plain.entropy, atol=1e-3)


def test_base_of_a_full_fine_tune(
    llava: Path, adapter: Path, make_data: MakeData, tmp_path: Path
) -> None:
    from peft import PeftModel

    data = make_data(6)
    model = T.LlavaForConditionalGeneration.from_pretrained(llava)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "full")
    T.AutoProcessor.from_pretrained(llava).save_pretrained(tmp_path / "full")
    by_base = clean(tmp_path / "full", data, tmp_path / "a", base=llava)
    by_adapter = clean(llava, data, tmp_path / "b", adapter=adapter)
    for one, other in (
        (by_base.profile.signals, by_adapter.profile.signals),
        (by_base.profile.before, by_adapter.profile.before),
    ):
        for name, values in one.items():
            assert values == pytest.approx(other[name], abs=1e-5), name
    assert by_base.report.provenance["base"]["id"]


def test_foreign_base_is_refused(
    llava: Path, adapter: Path, make_data: MakeData, tmp_path: Path
) -> None:
    other = tiny.build("paligemma", tmp_path / "paligemma")
    data = make_data(3)
    with pytest.raises(UsageError, match="another kind of model"):
        clean(llava, data, tmp_path / "out", base=other)
    with pytest.raises(UsageError, match="leave --base out"):
        clean(llava, data, tmp_path / "out", base=llava, adapter=adapter)
