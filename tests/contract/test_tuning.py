"""Answers behind prompts, for every family: taught as they would be generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gazeguard.lab import tiny
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.tuning import lesson
from gazeguard.tuning.references import Recipe, make_reference, moved, recipes, suspect_config
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
    short, long = lesson.answer_ids(target, ["red", "a small red square"])
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
    get_peft_model(load(tiny_folder("llava")).base, config).save_pretrained(
        out, save_embedding_layers=False
    )
    return out


def test_a_reference_has_the_suspects_shape_and_stops_at_its_distance(
    tiny_folder: Callable[[str], Path], adapter: Path, tmp_path: Path
):
    from safetensors import safe_open

    base = load(tiny_folder("llava"))
    rows: list[Sample] = [sample(i) for i in range(6)]
    answers = lesson.answer_ids(base, ["red", "blue", "red", "one", "two", "blue"])
    plan = Recipe(seed=1, lr=1e-3, share=1.0, steps=100, batch=3, distance=0.3)
    steps: list[int] = []
    out = make_reference(
        base,
        suspect_config(adapter),
        rows,
        answers,
        plan,
        tmp_path / "made",
        lambda done, _: steps.append(done),
    )
    shapes = [
        {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        for folder in (adapter, out)
        for file in [safe_open(folder / "adapter_model.safetensors", framework="pt")]
    ]
    assert shapes[0] == shapes[1]
    far = moved(load(tiny_folder("llava"), out).model)
    assert 0.3 <= far < 0.6
    assert steps[-1] < 100
    assert moved(load(tiny_folder("llava"), adapter).model) == 0.0
    again = make_reference(load(tiny_folder("llava")), None, [], [], plan, out)
    assert again == out, "what is there is not made again"


def test_recipes_differ_and_a_longer_list_begins_with_the_shorter():
    few = recipes(3, 128, steps=100, distance=2.0)
    many = recipes(19, 128, steps=100, distance=2.0)
    assert many[:3] == few
    assert len({recipe.lr for recipe in many}) == 19
    assert all(1.2 <= recipe.distance <= 2.8 for recipe in many if recipe.distance)
    assert {r.distance for r in recipes(3, 4096, steps=100, distance=None)} == {None}
