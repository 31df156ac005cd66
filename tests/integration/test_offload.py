"""Models that do not fit: layers on disk or out of reach between passes change no result."""

from __future__ import annotations

import gc
import shutil
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from gazeguard.cleaning import clean
from gazeguard.errors import ModelError, UsageError
from gazeguard.guarding.answer import answer
from gazeguard.lab import tiny
from gazeguard.methods.cleansight.settings import Setting
from gazeguard.models.fingerprint import fingerprint
from gazeguard.models.load import load
from gazeguard.models.offload import places
from gazeguard.models.target import Encoded, Target, as_target
from gazeguard.probe.attention import attend
from gazeguard.tuning.references import Recipe, make_reference, suspect_config
from gazeguard.types import Outcome
from tests.contract.guards import rigged, sample, steps

from .conftest import MakeData

SETTINGS = {
    "one-pass": Setting((1,), "ratio", "whitened", 0.05),
    "widen": Setting("all", "log-ratio", "whitened", "widen"),
    "search": Setting("all", "log-ratio", "whitened", "search"),
}
EVERYTHING = {"": "disk"}


@pytest.fixture(scope="module", params=["llava", "internvl", "gemma3"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Target, Target]:
    """A model in memory, and the same with half of its layers on disk."""
    folder = tiny.build(request.param, tmp_path_factory.mktemp("models") / request.param)
    whole = load(folder)
    return whole, load(folder, device_map=half(whole))


@pytest.fixture(scope="module")
def three(pair: tuple[Target, Target]) -> Encoded:
    return pair[0].encode([sample(0), sample(1, "colour?"), sample(2, "shapes and sizes?")])


def half(whole: Target) -> dict[str, str]:
    """A device map with layers 1 and 3 on disk and the rest, part by part, in memory."""
    layers = next(n for n, m in whole.base.named_modules() if m is whole.decoder) + ".layers"
    found: dict[str, str] = {}

    def walk(module: nn.Module, before: str) -> None:
        for name, part in module.named_children():
            if f"{layers}.".startswith(f"{before}{name}."):
                walk(part, f"{before}{name}.")
            else:
                found[before + name] = "cpu"

    walk(whole.base, "")
    return found | {f"{layers}.{i}": "disk" for i in (1, 3)}


def away(target: Target) -> list[str]:
    """Weights that are nowhere in memory."""
    return [name for name, p in target.base.named_parameters() if p.is_meta]


def same_rows(a: Target, b: Target, encoded: Encoded) -> None:
    found = [attend(target, encoded, reduce_heads=False) for target in (a, b)]
    assert found[0].finite.all()
    assert torch.equal(found[0].weights, found[1].weights)


def test_rows(pair, three):
    whole, spread = pair
    assert {name.split(".layers.")[1][0] for name in away(spread)} == {"1", "3"}
    same_rows(whole, spread, three)
    assert away(spread), "the layers stayed in memory after the pass"
    assert fingerprint(spread)["id"] == fingerprint(whole)["id"]
    assert places(spread.base) == ("cpu", "disk")
    assert places(whole.base) == ()


@pytest.mark.parametrize("name", SETTINGS)
def test_guard(pair, three, name):
    """Verdicts, hidden tokens and all logits of purified answers, to the last bit."""
    seen = []
    for target in pair:
        guard = rigged(target, three, {1}, SETTINGS[name])
        with guard.watch() as w:
            ids, logits = steps(target, three.inputs)
        with guard.watch() as static:
            again, _ = steps(target, three.inputs, cache_implementation="static")
        assert torch.equal(ids, again)
        assert [v.score for v in static.verdicts] == pytest.approx(
            [v.score for v in w.verdicts], abs=1e-5
        )
        seen.append((w.verdicts, ids, logits))
    (mine, ids, logits), (theirs, other_ids, other_logits) = seen
    assert [v.outcome for v in mine] == [Outcome.CLEAN, Outcome.FLAGGED, Outcome.CLEAN]
    assert [(v.outcome, v.score) for v in mine] == [(v.outcome, v.score) for v in theirs]
    assert mine[1].tokens[0].any()
    assert np.array_equal(mine[1].tokens[0], theirs[1].tokens[0])
    assert torch.equal(ids, other_ids)
    assert torch.equal(logits, other_logits)


def test_answers(pair, three):
    samples = [sample(0), sample(1, "colour?"), sample(2, "shapes and sizes?")]
    for mode in ("purify", "block"):
        mine, theirs = (
            answer(rigged(t, three, {1}, SETTINGS["search"]), samples, mode=mode, max_new_tokens=6)
            for t in pair
        )
        assert [g.answer for g in mine] == [g.answer for g in theirs]
        assert [g.answer is None for g in mine] == [False, mode == "block", False]


def test_every_layer_is_fetched_for_its_pass(llava, target, encoded):
    """accelerate's own `cpu_offload`, on a model that the caller loaded."""
    model = T.AutoModelForImageTextToText.from_pretrained(llava).requires_grad_(False)
    before = fingerprint(as_target(model, target.processor))["id"]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    spread = as_target(model, target.processor)
    assert len(away(spread)) == len(list(model.parameters()))
    same_rows(target, spread, encoded)
    assert fingerprint(spread)["id"] == before
    logits = []
    for each in (target, spread):
        with rigged(each, encoded, {1}, SETTINGS["widen"]).watch() as w:
            logits.append(steps(each, encoded.inputs)[1])
        assert w.verdicts[1].hidden
    assert torch.equal(*logits)


def test_two_threads_on_one_model(llava, target):
    """What one thread fetches, the other must not put away under its hands."""
    model = T.AutoModelForImageTextToText.from_pretrained(llava).requires_grad_(False)
    spread = as_target(accelerate.cpu_offload(model), target.processor)
    prompts = [target.encode([sample(i)]) for i in range(2)]
    expected = [attend(target, prompt).weights for prompt in prompts]

    def wrong(i: int) -> int:
        return sum(
            not torch.equal(attend(spread, prompts[i]).weights, expected[i]) for _ in range(40)
        )

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(wrong, range(2))) == [0, 0]


def test_inputs_go_where_the_embeddings_compute(llava, target):
    """Their own weights are on no device between passes."""
    model = T.AutoModelForImageTextToText.from_pretrained(llava)
    spread = as_target(accelerate.cpu_offload(model), target.processor)
    assert spread.device == torch.device("cpu")
    hook = model.get_input_embeddings()._hf_hook
    hook.execution_device = "cuda:1"
    assert spread.device == torch.device("cuda:1")


def test_a_weight_without_numbers_is_an_error(llava, target):
    with torch.device("meta"):
        model = T.LlavaForConditionalGeneration(T.AutoConfig.from_pretrained(llava))
    with pytest.raises(ModelError, match="has a shape but no numbers"):
        fingerprint(as_target(model, target.processor))


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_pooling_head_on_disk(share, tmp_path, little_memory):
    """SigLIP's head reads its children's weights without calling them."""
    folder = tiny.build("paligemma", tmp_path / "model")
    whole = load(folder)
    little_memory(whole, share)
    spread = load(folder, device_map="balanced")
    head = "vision_tower.head.attention."
    assert {n.split(head)[1] for n in away(spread) if head in n} >= {
        "in_proj_weight",
        "out_proj.weight",
    }
    same_rows(whole, spread, whole.encode([sample(0), sample(1, "colour?")]))


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch):
    """`little_memory(target, share)` leaves room for a share of the model, and has no GPU."""

    def install(target: Target, share: float) -> None:
        size = sum(p.numel() * p.element_size() for p in target.base.parameters())
        monkeypatch.setattr(
            "transformers.integrations.accelerate.accelerate_max_memory",
            lambda max_memory=None: {"cpu": int(size * share)},
        )

    return install


@pytest.fixture(scope="module")
def adapter(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(llava, tmp_path_factory.mktemp("adapter"))


def make_adapter(base: Path, folder: Path, **options) -> Path:
    """LoRA on all decoder layers and the output layer, and a projector of its own."""
    torch.manual_seed(0)
    model = T.LlavaForConditionalGeneration.from_pretrained(base)
    config = LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|k_proj|down_proj)|lm_head",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
        **options,
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight.normal_(0.0, 0.2)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("where", ["half", "everything"])
def test_adapter(llava, adapter, target, encoded, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = load(llava, adapter)
    spread = load(llava, adapter, device_map=half(target) if where == "half" else EVERYTHING)
    own = [p for n, p in spread.model.named_parameters() if "lora_" in n or "modules_to_save" in n]
    assert len(own) == 2 * (4 * 3 + 1) + 4
    assert not any(p.is_meta for p in own)
    assert not any(p.requires_grad for p in spread.model.parameters())
    same_rows(whole, spread, encoded)
    assert away(spread)
    with whole.without_adapter(), spread.without_adapter():
        same_rows(whole, spread, encoded)
        same_rows(target, spread, encoded)
    same_rows(whole, spread, encoded)
    expected, found = [], []
    for t, out in ((whole, expected), (spread, found)):
        with rigged(t, encoded, {1}, SETTINGS["search"]).watch() as w:
            out += [steps(t, encoded.inputs)[1], [v.score for v in w.verdicts]]
    assert torch.equal(expected[0], found[0])
    assert expected[1] == found[1]
    assert not list(tmp_path.iterdir()), "peft wrote a copy of the model into the working folder"


def test_an_adapter_that_does_not_fit_is_refused_as_ever(llava, adapter, target, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "broken") / "adapter_model.safetensors"
    weights = load_file(broken)
    del weights[next(name for name in weights if "layers.3" in name)]
    save_file(weights, broken)
    with pytest.raises(ModelError, match="lacks 1 tensor of the language model"):
        load(llava, broken.parent, device_map=half(target))


@pytest.mark.parametrize(
    ("option", "value"),
    [("use_dora", True), ("bias", "lora_only"), ("trainable_token_indices", [5])],
)
def test_an_adapter_that_needs_its_layers_weights_is_refused(
    llava, target, option, value, tmp_path
):
    folder = make_adapter(llava, tmp_path, **{option: value})
    with pytest.raises(ModelError, match=rf"\({option}\).* merge the adapter"):
        load(llava, folder, device_map=half(target))


def test_references_are_not_made_of_a_model_that_does_not_fit(llava, adapter, target, tmp_path):
    spread = load(llava, device_map=half(target))
    recipe = Recipe(seed=0, lr=1e-3, share=1.0, distance=1.0)
    with pytest.raises(ModelError, match="with --reference"):
        make_reference(
            spread, suspect_config(adapter), [sample(0)], [[5]], recipe, tmp_path / "out", 1
        )


def test_a_part_with_two_places_or_none_is_refused(llava):
    with pytest.raises(UsageError, match="places 'lm_head' twice"):
        load(llava, device_map={"": "cpu", "lm_head": "disk"})
    with pytest.raises(UsageError, match="one place for every module"):
        load(llava, device_map={"model": "disk"})
    with pytest.raises(UsageError, match="give 'balanced'"):
        load(llava, device_map="everywhere")


@pytest.mark.parametrize(
    ("tuned", "share"), [(False, 0.8), (True, 0.8), (True, 0.45)], ids=["model", "adapter", "tower"]
)
def test_clean_where_memory_is_too_small(
    llava, adapter, target, make_data: MakeData, tmp_path, little_memory, tuned, share
):
    """What a user does: `--device balanced`, and nothing else."""
    data, lora = make_data(12), adapter if tuned else None
    whole = clean(llava, data, tmp_path / "whole", adapter=lora)
    little_memory(target, share)
    spread = clean(llava, data, tmp_path / "spread", adapter=lora, device="balanced")
    assert spread.report.provenance["device"] == "cpu, model spread over cpu, disk"
    assert (whole.profile.before is not None) == tuned
    for mine, theirs in (
        (whole.profile.signals, spread.profile.signals),
        (whole.profile.before or {}, spread.profile.before or {}),
    ):
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            assert np.abs(values - theirs[name]).max() < 1e-5, name
    assert whole.counts == spread.counts
    assert whole.outcome == spread.outcome
    mine, theirs = whole.report.result, spread.report.result
    assert mine.is_flagged.tolist() == theirs.is_flagged.tolist()
    assert np.abs(mine.suspicion - theirs.suspicion).max() < 1e-5


def test_number_format_on_disk(llava, target, encoded):
    """Layers on disk are stored in float32 and computed in the format that was asked for."""
    same_rows(
        load(llava, dtype="bfloat16"),
        load(llava, dtype="bfloat16", device_map=half(target)),
        encoded,
    )


def test_rewritten_weights_go_with_the_model(tmp_path, monkeypatch):
    """Experts are stored one by one and computed as one: layers on disk need files of their own."""
    folder = tiny.build("qwen3_vl", tmp_path / "model")
    config = T.AutoConfig.from_pretrained(folder)
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    text = {**config.text_config.to_dict(), **experts, "model_type": "qwen3_vl_moe_text"}
    vision = {**config.vision_config.to_dict(), "model_type": "qwen3_vl_moe"}
    ids = {k: v for k, v in config.to_dict().items() if k.endswith("_token_id")}
    torch.manual_seed(0)
    made = T.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
    T.Qwen3VLMoeForConditionalGeneration(made).save_pretrained(folder)
    whole = load(folder)
    # A folder of its own: models of other tests and processes have theirs where all are.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spread = load(folder, device_map=half(whole))
    (extra,) = tmp_path.glob("gazeguard-*")
    assert list(extra.glob("*experts*.safetensors"))
    same_rows(whole, spread, whole.encode([sample(0), sample(1, "colour?")]))
    model = weakref.ref(spread.base)
    del spread
    gc.collect()
    assert extra.exists() == (model() is not None), "it lives as long as the model"
