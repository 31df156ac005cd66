"""From blocks to a profile that lies on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gazeguard.cleaning import assemble as room
from gazeguard.cleaning.assemble import Texts, assemble
from gazeguard.cleaning.measure import BEFORE, SCHEMA, SIGNALS, skipped_table

LAYERS = (0, 1, 2)


def numbers(row: int, heads: int) -> dict[str, list[float]]:
    return {
        name: [row + 0.5] * (len(LAYERS) * (heads if "head" in name else 1)) for name in SIGNALS
    }


def block(*rows: int, before: bool = True, heads: int = 2) -> pa.Table:
    found = []
    for row in rows:
        words = {"sample_id": f"id{row}", "prompt": f"prompt {row}", "answer": f"answer {row}"}
        record = {"row": row, "turn": 1, "image_tokens": 10 + row, **words, **numbers(row, heads)}
        if before:
            record |= {BEFORE + name: values for name, values in numbers(-row, heads).items()}
        found.append(record)
    return pa.Table.from_pylist(found, schema=SCHEMA)


def test_blocks_become_arrays_in_their_order(tmp_path: Path) -> None:
    blocks = [block(0, 1), skipped_table(2, "broken"), block(3)]
    profile, failed, _ = assemble(iter(blocks), LAYERS, tmp_path / "p")
    assert profile.row.tolist() == [0, 1, 3]
    assert profile.image_tokens.tolist() == [10, 11, 13]
    assert profile.answer == ["answer 0", "answer 1", "answer 3"]
    assert profile.signals["entropy"].shape == (3, 3)
    assert profile.signals["head_mass"].shape == (3, 3, 2)
    np.testing.assert_array_equal(profile.entropy[:, 0], [0.5, 1.5, 3.5])
    assert profile.before is not None
    np.testing.assert_array_equal(profile.before["entropy"][:, 2], [0.5, -0.5, -2.5])
    assert [(s.row, s.reason) for s in failed] == [(2, "broken")]
    assert not profile.entropy.flags.writeable, "it is a mapped file"


def test_one_row_without_the_look_before_leaves_no_before(tmp_path: Path) -> None:
    profile, _, _ = assemble(
        iter([block(0), block(1, before=False), block(2)]), LAYERS, tmp_path / "p"
    )
    assert profile.before is None
    assert profile.signals["head_entropy"].shape == (3, 3, 2)


def test_nothing_measured_is_an_empty_profile(tmp_path: Path) -> None:
    profile, failed, _ = assemble(iter([skipped_table(0, "broken")]), LAYERS, tmp_path / "p")
    assert len(profile) == 0
    assert profile.entropy.shape == (0, 3)
    assert list(profile.prompt) == []
    assert profile.before is None
    assert len(failed) == 1


def test_an_earlier_profile_leaves_nothing_behind(tmp_path: Path) -> None:
    assemble(iter([block(0, 1, 2)]), LAYERS, tmp_path / "p")
    profile, _, _ = assemble(iter([block(7)]), LAYERS, tmp_path / "p")
    assert profile.row.tolist() == [7]
    assert list(profile.sample_id) == ["id7"]


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_texts_are_read_like_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(room, "_TEXT_ROWS", batch)
    profile, _, _ = assemble((block(i, i + 1) for i in range(0, 10, 2)), LAYERS, tmp_path / "p")
    texts, plain = profile.prompt, [f"prompt {i}" for i in range(10)]
    assert isinstance(texts, Texts)
    assert list(texts) == plain
    assert texts == plain
    assert texts != plain[1:]
    assert len(texts) == 10
    assert texts[4] == plain[4]
    for part in (
        slice(2, 7),
        slice(None),
        slice(8, 99),
        slice(5, 2),
        slice(0, 9, 3),
        slice(-3, -1),
    ):
        assert texts[part] == plain[part]
    with pytest.raises(IndexError):
        texts[10]
