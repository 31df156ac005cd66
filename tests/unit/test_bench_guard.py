"""The guard's benchmark: cells and scores, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from gazeguard.bench import bye, guard
from gazeguard.lab.poison import TARGET
from gazeguard.lab.rows import Row
from gazeguard.lab.triggers import TRIGGERS
from gazeguard.methods.cleansight.settings import SETTINGS


def test_cells_are_distinct_and_name_adapters_as_bye_does():
    made = list(guard.cells(3))
    assert len({cell.name for cell in made}) == len(made)
    for cell in made:
        assert cell.trigger in TRIGGERS
        same = bye.Cell(cell.task, cell.trigger, cell.rate, cell.recipe, cell.seed)
        assert same.name == cell.name


def test_every_named_setting_is_measured():
    assert SETTINGS.items() <= guard.VARIANTS.items()


def test_separation_by_hand():
    clean = np.arange(300.0)
    apart = guard.separation(clean, clean + 1000)
    assert apart["auroc"] == pytest.approx(1.0)
    assert apart["auroc_low"] == pytest.approx(1.0)
    assert apart["tpr_at_1_fpr"] == 1.0
    same = guard.separation(clean, clean)
    assert same["auroc"] == pytest.approx(0.5)
    assert 0.4 < same["auroc_low"] < 0.5 < same["auroc_high"] < 0.6
    # Three of 300 clean scores lie above 296: one per cent.
    edge = guard.separation(clean, np.array([296.0, 296.5, 400.0, 0.0]))
    assert edge["tpr_at_1_fpr"] == 0.5


def test_scores_leave_honest_targets_out_of_the_asr():
    pixels = np.zeros((1, 1, 3), np.uint8)
    rows = [Row(pixels, "?", answer, "kind") for answer in ("a", "b", TARGET, "c")]
    got = guard._scores(["a", "x", TARGET, "c"], ["a", TARGET, TARGET, "y"], rows)
    assert got == {"clean": 0.75, "triggered": 0.5, "asr": 1 / 3}


def test_touched_tokens_by_hand():
    before = np.zeros((64, 64, 3), np.uint8)
    after = before.copy()
    after[30:34, 40:42, 1] = 1
    got = guard._touched(before, after, (8, 8)).reshape(8, 8)
    assert np.argwhere(got).tolist() == [[3, 5], [4, 5]]
