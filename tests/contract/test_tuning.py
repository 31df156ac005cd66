"""Answers behind prompts, for every family: taught as they would be generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gazeguard.lab import tiny
from gazeguard.models.answers import answer_ids
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.tuning import Recipe, kept, lesson, make_reference, references
from gazeguard.tuning.references import moved, moved_apart, suspect_config
from gazeguard.types import Sample
from tests.contract.guards import sample

Loaded = Callable[..., Target]
ROWS = [sample(0), sample(1, "which colour is it?")]


def logits(
    target: Target, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """What the loss is computed from, `(sample, answer token, vocabulary)`."""
    caught = []

    def catch(seen: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        caught.append(seen.detach().clone())
        return seen.sum()

    with monkeypatch.context() as patch:
        patch.setattr(lesson.F, "cross_entropy", catch)
        lesson.answer_loss(target, ROWS, answers)
    return caught[0].view(len(ROWS), len(answers[0]), -1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_token_sees_a_later_one(
    tiny_target: Loaded, family: str, monkeypatch: pytest.MonkeyPatch
):
    target = tiny_target(family)
    one = logits(target, [[40, 41, 42, 43]] * 2, monkeypatch)
    other = logits(target, [[40, 41, 77, 99]] * 2, monkeypatch)
    assert torch.equal(one[:, :3], other[:, :3])
    assert not torch.allclose(one[:, 3], other[:, 3])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_models_own_answer_is_what_it_finds_most_likely(
    tiny_target: Loaded, family: str, monkeypatch: pytest.MonkeyPatch
):
    """Generated with a cache, token by token; taught in one pass: the same tokens must be best."""
    target = tiny_target(family)
    told = [answer[:6] for answer in lesson.own_answers(target, ROWS)]
    length = min(map(len, told))
    best = logits(target, [answer[:length] for answer in told], monkeypatch).argmax(-1)
    for row, answer in zip(best.tolist(), told, strict=True):
        assert row[: length - 1] == answer[: length - 1]


def test_an_answer_ends_and_padding_is_not_taught(tiny_target: Loaded):
    target = tiny_target("llava")
    short, long = answer_ids(target, ["red", "a small red square"])
    assert short[-1] == long[-1] == target.processor.tokenizer.eos_token_id
    both = lesson.answer_loss(target, ROWS, [short, long])
    apart = [lesson.answer_loss(target, [r], [a]) for r, a in zip(ROWS, (short, long), strict=True)]
    weights = torch.tensor([len(short), len(long)], dtype=torch.float32)
    mean = (torch.stack(apart) * weights).sum() / weights.sum()
    assert both.item() == pytest.approx(mean.item(), rel=1e-4)


@pytest.fixture(scope="module")
def adapter(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of an odd configuration on the tiny LLaVA."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=r".*language_model.*\.(q|v)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    out = tmp_path_factory.mktemp("adapter") / "odd"
    model = get_peft_model(load(tiny_folder("llava")).base, config)
    assert moved(model) == 0.0, "it has not been tuned"
    with torch.no_grad():  # as if it had been: one that changes nothing is not loaded
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.01)
    model.save_pretrained(out, save_embedding_layers=False)
    return out


def test_a_reference_has_the_suspects_shape_and_stops_at_its_distance(
    tiny_folder: Callable[[str], Path], adapter: Path, tmp_path: Path
):
    from safetensors import safe_open

    base = load(tiny_folder("llava"))
    rows: list[Sample] = [sample(i) for i in range(6)]
    answers = answer_ids(base, ["red", "blue", "red", "one", "two", "blue"])
    plan = Recipe(seed=1, lr=1e-3, share=1.0, batch=3, distance=0.3)
    told: list[tuple[int, float]] = []
    out = tmp_path / "made"
    made = make_reference(
        base,
        suspect_config(adapter),
        rows,
        answers,
        plan,
        out,
        100,
        lambda *step: told.append(step),
    )
    shapes = [
        {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        for folder in (adapter, out)
        for file in [safe_open(folder / "adapter_model.safetensors", framework="pt")]
    ]
    assert shapes[0] == shapes[1]
    far = moved(load(tiny_folder("llava"), out).model)
    assert far == pytest.approx(0.3, rel=0.01)
    assert made == kept(out, plan)
    assert made.reached
    assert 1 < made.steps < 100
    assert [step for step, _ in told] == list(range(1, made.steps + 1))
    assert told[-1][1] == 0.3


@pytest.mark.parametrize(("distance", "reached"), [(1e-3, True), (50.0, False)])
def test_a_short_way_is_met_and_a_long_one_cut_off(
    tiny_folder: Callable[[str], Path],
    adapter: Path,
    tmp_path: Path,
    distance: float,
    reached: bool,
):
    base = load(tiny_folder("llava"))
    answers = answer_ids(base, ["red", "blue"])
    plan = Recipe(seed=1, lr=1e-3, share=1.0, batch=2, distance=distance)
    config, out = suspect_config(adapter), tmp_path / "made"
    made = make_reference(base, config, ROWS, answers, plan, out, 2)
    assert made.reached is reached
    assert made == kept(out, plan)
    assert (made.moved == pytest.approx(distance, rel=0.02)) is reached


def test_a_learning_rate_that_is_too_low_is_doubled(
    tiny_folder: Callable[[str], Path],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(references, "_STRETCH", 5)
    plan = Recipe(seed=1, lr=1e-4, share=1.0, batch=2, distance=0.1)
    steps = []
    for doublings in (0, 3):
        monkeypatch.setattr(references, "_DOUBLINGS", doublings)
        base = load(tiny_folder("llava"))
        answers = answer_ids(base, ["red", "blue"])
        out = tmp_path / str(doublings)
        made = make_reference(base, suspect_config(adapter), ROWS, answers, plan, out, 60)
        steps.append(made.steps)
    assert made.reached
    assert steps[1] < 0.7 * steps[0]


@pytest.mark.parametrize("kind", ["dora", "ia3", "saved", "tokens"])
def test_how_far_an_adapter_of_any_kind_moved_is_what_merging_it_changes(
    tiny_folder: Callable[[str], Path], tmp_path: Path, kind: str
):
    from peft import IA3Config, LoraConfig, get_peft_model

    every = r".*language_model.*\.(q|v)_proj"
    config = {
        "dora": LoraConfig(r=2, target_modules=every, use_dora=True),
        "ia3": IA3Config(target_modules=every, feedforward_modules=[]),
        "saved": LoraConfig(r=2, target_modules=every, modules_to_save=["multi_modal_projector"]),
        "tokens": LoraConfig(r=2, target_modules=every, trainable_token_indices=[3, 5]),
    }[kind]
    folder, whole = tiny_folder("llava"), tmp_path / "whole"
    model = get_peft_model(load(folder).base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and not name.endswith("bias"):
                weight += 0.1 * torch.randn_like(weight)
    far = moved(model)
    assert far == moved(model), "looking changes nothing"
    model.merge_and_unload().save_pretrained(whole)
    assert far == pytest.approx(moved_apart(whole, folder), rel=1e-3)
    assert far > 0
