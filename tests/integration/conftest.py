"""A tiny random LLaVA, small data sets, and a detector whose answer the test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gazeguard.cleaning.proof import Group
from gazeguard.lab import tiny
from gazeguard.models.load import load
from gazeguard.models.target import Encoded, Target
from gazeguard.types import CleaningResult, Finding, LayerStat, Outcome, Profile, Verdict
from tests.contract.guards import sample

MakeData = Callable[..., Path]


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random LLaVA; shared, so read only."""
    return tiny.build("llava", tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def target(llava: Path) -> Target:
    """The tiny LLaVA, loaded."""
    return load(llava)


@pytest.fixture(scope="module")
def encoded(target: Target) -> Encoded:
    """Three questions, each about a picture of its own."""
    return target.encode([sample(0), sample(1, "colour?"), sample(2, "shapes and sizes?")])


@pytest.fixture(scope="session")
def make_data(tmp_path_factory: pytest.TempPathFactory) -> MakeData:
    """`make_data(n, broken=(), same=False)` writes a LLaVA JSON set and gives its path."""

    def make(n: int, broken: tuple[int, ...] = (), same: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("data")
        rng = np.random.default_rng(0)
        rows = []
        for i in range(n):
            name = "0.png" if same else f"{i}.png"
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            if i in broken:
                (folder / name).write_bytes(b"not an image")
            elif not (folder / name).exists():
                Image.fromarray(pixels).save(folder / name)
            question = "what colour?" if same else "what colour is it " + "really " * (i % 4) + "?"
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": "red"},
            ]
            rows.append({"id": i, "image": name, "conversations": turns})
        path = folder / "data.json"
        path.write_text(json.dumps(rows, indent=1))
        return path

    return make


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`decide(*rows)` makes the detector flag exactly these rows, whatever was measured."""

    def install(*rows: int) -> None:
        class Chosen:
            def __init__(self, rule: str, random_state: int) -> None:
                self.rule = rule

            def fit(self, profile: Profile) -> Chosen:
                flagged = np.isin(profile.row, rows)
                verdict = (
                    Verdict(Outcome.FLAGGED, 1.0, 0.5, "test", "Chosen.", (Finding("chosen"),))
                    if flagged.any()
                    else Verdict(Outcome.CLEAN, 0.0, 0.5, "test", "Nothing chosen.")
                )
                self.result_ = CleaningResult(
                    method="bye",
                    rule=self.rule,
                    verdict=verdict,
                    suspicion=flagged.astype(np.float64),
                    is_flagged=flagged,
                    score=profile.entropy.mean(1, dtype=np.float64),
                    score_name="mean entropy (nats)",
                    components=(),
                    layer_stats=tuple(LayerStat(i, 0.0, False) for i in profile.layers),
                    info={"groups": []},
                )
                return self

        def chosen(
            profile: Profile, result: CleaningResult, candidates: list[str], seed: int
        ) -> list[Group]:
            named = list(zip(profile.row.tolist(), profile.turn.tolist(), strict=True))
            mine, others = (
                tuple(one for one in named if (one[0] in rows) == wanted)
                for wanted in (True, False)
            )
            return [Group("chosen", True, mine, mine, others, ())] if rows else []

        monkeypatch.setattr("gazeguard.cleaning.judge.BYE", Chosen)
        monkeypatch.setattr("gazeguard.cleaning.run.groups", chosen)

    return install
