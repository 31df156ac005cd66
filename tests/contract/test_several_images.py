"""Prompts with several images, in every family: each image known, judged and searched apart."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from gazeguard.cleaning.gallery import _pictures
from gazeguard.guarding.guard import Guard
from gazeguard.lab import tiny
from gazeguard.methods.cleansight.looks import Look
from gazeguard.methods.cleansight.settings import Setting
from gazeguard.models.recognise import frame_of, images, recognise
from gazeguard.models.target import ImageTokens, by_image
from gazeguard.scanning.look import _Maps
from gazeguard.types import KeyKind, Outcome

from .conftest import sample
from .guards import mask_edited, rigged, steps

families = pytest.mark.parametrize("family", tiny.FAMILIES)
SEARCH = Setting("all", "log-ratio", "whitened", "search")


class CalmWithout(Guard):
    """Flags its samples until some tokens of theirs are hidden, whatever attention says."""

    def __init__(self, guard: Guard, wanted: torch.Tensor) -> None:
        super().__init__(guard.target, guard._saved)
        self.wanted = wanted  # bool (sample, position)
        self.looks = 0

    def hiding(self, look, image, images, flagged):
        """As ever, with scores of our own."""
        search = super().hiding(look, image, images, flagged)
        tokens = next(search)
        while True:
            look = yield tokens
            self.looks += 1
            calm = (tokens >= self.wanted).all(1).numpy()
            scores = np.where(calm, 0.0, 2.0 * self.threshold + tokens.sum(1).numpy())
            try:
                tokens = search.send(Look(scores, look.evidence))
            except StopIteration as end:
                return end.value


@families
@pytest.mark.parametrize("which", [0, 1])
def test_the_search_hides_only_in_the_image_that_calms(family, which, tiny_target):
    target, eager = tiny_target(family), tiny_target(family, "eager")
    clean = sample(0, [(64, 64)], 0, "what is it?")
    asked = sample(1, [(64, 64), (64, 64)], 0, "against", 1, "which one?")
    encoded = target.encode([clean, asked])
    known = encoded.images[1]
    slots = (encoded.key_kind[1] == KeyKind.IMAGE).nonzero().flatten()
    mine = slots.split([image.count for image in known])[which]
    wanted = torch.zeros_like(encoded.key_kind, dtype=torch.bool)
    wanted[1, mine[-1]] = True
    guard = CalmWithout(rigged(target, encoded, {1}, SEARCH), wanted)
    _, plain = steps(target, encoded.inputs)
    with guard.watch(encoded=encoded) as w:
        _, logits = steps(target, encoded.inputs)
    assert [v.outcome for v in w.verdicts] == [Outcome.CLEAN, Outcome.FLAGGED]
    verdict = w.verdicts[1]
    for arrays in (verdict.tokens, verdict.heat):
        assert [one.shape for one in arrays] == [image.shape for image in known]
    assert verdict.tokens[which].ravel()[-1], "the token that matters"
    assert not verdict.tokens[1 - which].any(), "the other image is left alone"
    assert guard.looks >= 3, "both images as wholes, then parts"
    shown = verdict.as_json()["images"]
    assert [one["image_tokens"] for one in shown] == [image.count for image in known]
    assert [bool(one["tokens"]) for one in shown] == [which == 0, which == 1]
    hidden = torch.zeros_like(wanted[1])
    hidden[mine] = torch.from_numpy(verdict.tokens[which].ravel())
    with mask_edited(eager, {1: hidden}, guard.plan.hide_from):
        _, expected = steps(eager, encoded.inputs)
    assert (logits - expected).abs().max() < 1e-4
    assert torch.equal(logits[:, 0], plain[:, 0])


@families
def test_where_no_image_calms_all_go(family, tiny_target):
    target = tiny_target(family)
    encoded = target.encode([sample(1, [(64, 64), (40, 60)], 0, 1, "which one?")])
    nowhere = encoded.key_kind == KeyKind.PROMPT
    guard = CalmWithout(rigged(target, encoded, {0}, SEARCH), nowhere)
    with guard.watch(encoded=encoded) as w:
        steps(target, encoded.inputs, 1)
    assert len(w.verdicts[0].tokens) == 2
    assert all(one.all() for one in w.verdicts[0].tokens)


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_images_of_a_padded_batch_are_those_of_its_samples(family, side, tiny_target):
    """One, two and three of different sizes, next to each other and apart."""
    target = tiny_target(family)
    asked = [
        sample(0, [(30, 30), (50, 90), (64, 64)], 0, "and", 1, 2, "which is larger?"),
        sample(1, [(64, 64)], 0, "?"),
        sample(2, [(50, 90), (30, 30)], 1, 0, "a much longer question about the two of them"),
    ]
    encoded = target.encode(asked, side)
    sizes = {}
    for i, one in enumerate(asked):
        assert encoded.images[i] == target.encode([one]).images[0], "whatever stands beside it"
        known = encoded.images[i]
        assert len(known) == len(one.images)
        total = int((encoded.key_kind[i] == KeyKind.IMAGE).sum())
        assert sum(image.count for image in known) == total
        for place, image in zip(one.prompt_images, known, strict=True):
            assert sizes.setdefault(one.images[place].size, image) == image, "by size, any order"
            assert image.grid is None or image.grid[0] * image.grid[1] == image.count


@families
def test_pictures_of_a_report_have_their_own_heat(family, tiny_target):
    target = tiny_target(family)
    asked = sample(0, [(64, 64), (50, 90)], 1, "and", 0, "?")
    known = target.encode([asked]).images[0]
    found = _pictures(target, asked)
    assert [picture.image.size for picture in found] == [(90, 50), (64, 64)], "in prompt order"
    for picture, image in zip(found, known, strict=True):
        assert (picture.heat is None) == (image.grid is None)
        for heat in (picture.heat or {}).values():
            assert heat.shape == image.grid
    whole = [sum(float(p.heat[0].sum()) for p in found if p.heat)]
    if all(image.grid for image in known):
        assert whole == pytest.approx([1.0], abs=1e-4), "shares of one and the same attention"


def test_mean_maps_count_every_image_that_has_a_grid(tiny_target):
    """An even look is the same map, whether an image is alone in its prompt or not."""
    encoded = tiny_target("internvl").encode(
        [
            sample(0, [(64, 64)], 0, "?"),
            sample(1, [(64, 64), (40, 60), (64, 64)], 0, 1, 2, "?"),
        ]
    )
    image = encoded.key_kind == KeyKind.IMAGE
    maps = _Maps()
    maps.add((image / image.sum(1, keepdim=True))[:, None], encoded, torch.tensor([True, True]))
    assert maps._count == 3, "one of four is cut into tiles"
    assert np.allclose(maps.mean(1), 0.25)


@pytest.mark.parametrize("family", ["llava", "internvl", "gemma3", "llava_next", "qwen3_vl"])
def test_a_foreign_batch_without_tiles_tells_images_apart(family, tiny_target):
    target = tiny_target(family)
    size = (28, 28)
    asked = [
        sample(0, [size, size], 0, "and", 1, "?"),
        sample(1, [size], 0, "a longer question"),
    ]
    encoded = target.encode(asked)
    inputs = encoded.inputs
    kind = recognise(target, frame_of(target), inputs["input_ids"], inputs["attention_mask"])
    assert images(target, kind, inputs) == encoded.images
    assert [len(one) for one in encoded.images] == [2, 1]
    text = torch.full_like(kind, KeyKind.PROMPT)
    assert images(target, text, {}) == ((), ()), "no image at all"


def test_sizes_that_do_not_fit_the_tokens_are_not_believed(tiny_target):
    target = tiny_target("qwen2_5_vl")
    encoded = target.encode([sample(0, [(64, 64), (30, 30)], 0, 1, "?")])
    inputs = copy.copy(encoded.inputs)
    inputs["image_grid_thw"] = inputs["image_grid_thw"][:1]
    assert images(target, encoded.key_kind, inputs) == ((ImageTokens(5),),)


def test_beams_do_not_shift_the_sizes_of_a_foreign_batch(tiny_target):
    """Rows are repeated for beams, sizes of pictures are not."""
    target = tiny_target("qwen2_5_vl")
    encoded = target.encode(
        [sample(0, [(40, 60)], 0, "?"), sample(1, [(64, 64), (50, 90)], 0, "and", 1, "?")]
    )
    guard = rigged(target, encoded, {1}, Setting("all", "log-ratio", "whitened", "widen"))
    with guard.watch("detect") as w:
        steps(target, encoded.inputs, 2, num_beams=3)
    assert [one.shape for one in w.verdicts[1].tokens] == [(2, 2), (2, 3)]


def test_values_by_image():
    values = torch.arange(2 * 9).view(2, 9)
    first, second = by_image(values, (ImageTokens(6, (2, 3)), ImageTokens(3)))
    assert first.tolist() == [[[0, 1, 2], [3, 4, 5]], [[9, 10, 11], [12, 13, 14]]]
    assert second.tolist() == [[6, 7, 8], [15, 16, 17]]
    assert by_image(values[:, :0], ()) == []
