"""The benchmark of scale runs at small sizes; its arithmetic and its page are right."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from gazeguard.bench.scale.__main__ import main
from gazeguard.bench.scale.cost import arithmetic
from gazeguard.bench.scale.memory import RATE
from gazeguard.bench.scale.plan import Assumed, filled, plan, row_bytes
from gazeguard.bench.scale.sets import small_set
from gazeguard.bench.speed.forward import Size, random_llava
from gazeguard.data.read import open_dataset

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick_run_measures_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    done = CliRunner().invoke(main, ["--out", str(out), "--quick"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())["figures"]
    assert len(figures) == 16
    assert all(figure["value"]["median"] > 0 for figure in figures)
    assert sum(figure["name"].endswith(RATE) for figure in figures) == 1


def test_rows_of_a_made_set_differ_and_can_be_read(tmp_path: Path) -> None:
    path = small_set(tmp_path / "set.parquet", 1200)
    assert duckdb.sql(f"select count(*) from '{path}'").fetchall() == [(1200,)]
    rows = list(open_dataset(path).rows())
    assert len({row.sample_id for row in rows}) == 1200


def test_counted_arithmetic_is_that_of_a_forward_pass(tmp_path: Path) -> None:
    folder = random_llava(tmp_path / "m", Size(grid=6, layers=3, hidden=64, heads=4))
    # With whole maps, attention is matrix products, which the counter knows.
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    config, tokens = model.config, 60
    ids = torch.full((1, tokens), 5)
    ids[0, 2:38] = config.image_token_id
    side = config.vision_config.image_size
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.zeros(1, 3, side, side),
            use_cache=False,
            logits_to_keep=1,
        )
    row = arithmetic(config, tokens)
    head = 2 * config.text_config.hidden_size * config.text_config.vocab_size
    assert row.of(1) == pytest.approx(counter.get_total_flops() - head, rel=0.03)
    assert row.of(2) - row.of(1) == row.language


def test_a_plan_follows_from_what_was_measured_and_assumed() -> None:
    measured = {"figures": [{"name": f"x, {RATE}", "value": {"median": 1000.0}}]}
    text = plan(measured, Assumed(peak=1e15, shares=(0.5,), gpu_hour=2.0))
    config = hf.LlavaConfig()
    rate = 0.5e15 / arithmetic(config, 640).of(2)
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| 1,000,000")]
    hours, money = cells[0][3], cells[0][4]
    assert float(hours) == pytest.approx(1e6 / rate / 3600, abs=0.5)
    assert float(money.strip("$")) == pytest.approx(2 * 1e6 / rate / 3600, abs=1)
    assert row_bytes(32, 32) == 4 * 2 * (2 * 32 + 2 * 32 * 32) + 300
    assert np.isclose(float(cells[1][1].split()[0]), 1e6 * row_bytes(32, 32) / 1e12, atol=0.005)


def test_the_page_says_what_was_measured() -> None:
    measured = json.loads((ROOT / "bench" / "results" / "scale.json").read_text("utf-8"))
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    assert filled(page, measured) == page, (
        "run python -m gazeguard.bench.scale.plan bench/results/scale.json docs/scale.md"
    )
    assert not measured["quick"]


def test_a_page_without_a_place_for_a_table_is_a_mistake() -> None:
    measured = {"figures": [{"name": RATE, "value": {"median": 1.0}}], "machine": {}}
    measured["figures"][0] |= {"text": "", "target": ""}
    with pytest.raises(ValueError, match="no place for 'measured'"):
        filled("# Scale", measured)
