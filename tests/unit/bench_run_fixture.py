"""An artificial benchmark run: three levels, two kinds of model, two seeds, all that can lack."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

ROWS, HELD = 400, 200
ATTACKS = (  # attack, rate in %, task
    ("badnet-center", 1, "captions"),
    ("badnet-center", 5, "captions"),
    ("badnet-center", 10, "captions"),
    ("blended", 10, "captions"),
    ("wanet", 10, "easy-vqa"),
    ("none", 0, "captions"),
)
DEFENCES = {  # level, ours, kind, quality in [0, 1]
    "bye": ("data", True, "vlm", 0.97),
    "random-drop": ("data", False, "vlm", 0.2),
    "spectral-signatures": ("data", False, "vlm", 0.7),
    "cleansight": ("input", True, "vlm", 0.95),
    "gaussian-blur": ("input", False, "vlm", 0.4),
    "entropyscan": ("model", True, "vlm", 0.9),
    "score-threshold": ("model", False, "vlm", 0.5),
    "amdet": ("model", True, "encoder", 0.95),
    "gates": ("model", False, "encoder", 0.3),
}
FAILED = "attack failed: ASR 0.42 (gate 0.90)"
UNSEEN = "not run yet"
ELSEWHERE = "not applicable: a defence of another kind of model"


def model(attack: str, rate: int, task: str, seed: int, kind: str = "vlm") -> dict[str, Any]:
    benign = attack == "none"
    failed = attack == "wanet" or (attack, seed) == ("blended", 1)
    return {
        "name": f"{kind}-{attack}-{rate}-s{seed}",
        "base": "lab" if kind == "vlm" else "clip",
        "kind": kind,
        "truth": "benign" if benign else "backdoored",
        "attack": attack,
        "label": "no attack" if benign else f"{attack} {rate} %",
        "group": f"{task}, 6 epochs",
        "passed": not failed,
        "clean": 0.91,
        "asr": None if benign else 0.42 if failed else 0.97,
        "n": HELD,
        "why": FAILED if failed else None,
        "recipe": {"task": task, "rate": rate / 100, "seed": seed, "epochs": 6},
    }


def models() -> list[dict[str, Any]]:
    found = [model(*attack, seed) for attack in ATTACKS for seed in (0, 1)]
    texts = ("tpa", 50, "prompts"), ("none", 0, "prompts")
    return found + [model(*attack, seed, "encoder") for attack in texts for seed in (0, 1, 2)]


def result(level: str, quality: float, benign: bool, rate: float, rng: np.random.Generator) -> Any:
    def of(share: float, n: int = HELD) -> list[int]:
        return [int(rng.binomial(n, share)), n]

    if level == "data":
        bad = round(ROWS * rate)
        hit = int(rng.binomial(bad, quality))
        wrong = int(rng.binomial(ROWS - bad, 0.2 * (1 - quality)))
        refit = {"asr": None if benign else of(1 - quality), "clean": of(0.9)}
        found = {"fp": wrong, "tn": ROWS - bad - wrong, "refit": refit}
        return found if benign else {"tp": hit, "fn": bad - hit, **found}
    if level == "input":
        before = {"clean": of(0.9), "triggered": of(0.02), "asr": of(0.97)}
        after = {"clean": of(0.85), "triggered": of(0.8 * quality), "asr": of(1 - quality)}
        judges = quality > 0.5
        shift = rng.normal(4 * quality, 1, HELD).tolist()
        scores = {"clean": rng.normal(0, 1, HELD).tolist(), "triggered": shift}
        flagged = {"clean": of(0.02), "triggered": of(quality)}
        if benign:
            for answers in (before, after):
                answers.update(triggered=None, asr=None)
            flagged["triggered"], scores["triggered"] = None, None
        return {
            "before": before,
            "after": after,
            "flagged": flagged if judges else None,
            "scores": scores if judges else None,
        }
    seen = rng.random() < (0.05 if benign else quality)
    score = float(rng.normal(0 if benign else 3 * quality))
    if rng.random() < 0.1:
        return {"outcome": "inconclusive", "score": None}
    return {"outcome": "flagged" if seen else "clean", "score": score}


def suite(cells: list[dict[str, Any]], title: str = "An artificial run") -> dict[str, Any]:
    about = "what it does, in one line"
    lines = [
        {"name": name, "level": level, "ours": ours, "about": about}
        for name, (level, ours, _, _) in DEFENCES.items()
    ]
    table = "Paper, Table 1: a 7B model"
    figures = (
        ("bye", "badnet-center", "f1", 0.99),
        ("random-drop", "badnet-center", "f1", 0.18),
        ("cleansight", "blended", "asr_after", 0.01),
        ("gaussian-blur", "blended", "asr_after", 0.31),
    )
    names = ("defence", "attack", "metric", "value")
    return {
        "name": "artificial",
        "title": title,
        "models": models(),
        "defences": lines,
        "cells": cells,
        "published": [{**dict(zip(names, each, strict=True)), "where": table} for each in figures],
    }


def make_run(folder: Path, shuffle: int | None = None, title: str = "An artificial run") -> Path:
    """Write a run. `shuffle` changes the order of cells and files, and nothing else."""
    (folder / "cells").mkdir(parents=True)
    cells, files = [], {}
    for place, each in enumerate(models()):
        for name, (level, _, kind, quality) in DEFENCES.items():
            cell = {"model": each["name"], "defence": name, "file": None, "why": None}
            cells.append(cell)
            if kind != each["kind"]:
                cell["why"] = ELSEWHERE
            elif not each["passed"]:
                cell["why"] = each["why"]
            elif (name, each["name"]) == ("spectral-signatures", "vlm-badnet-center-10-s1"):
                cell["why"] = UNSEEN
            else:
                cell["file"] = f"cells/{each['name']}-{name}.json"
                rng = np.random.default_rng([place, len(cells)])
                benign, rate = each["truth"] == "benign", each["recipe"]["rate"]
                files[cell["file"]] = {
                    "suite": "artificial",
                    "defence": name,
                    "level": level,
                    "model": each["name"],
                    "result": result(level, quality, benign, rate, rng),
                    "made": {"commit": "abc1234", "machine": {"cpu": "a CPU", "cores": 2}},
                }
    if shuffle is not None:
        Random(shuffle).shuffle(cells)
    for place, path in enumerate(cell["file"] for cell in cells if cell["file"]):
        content = files[path]
        content["made"]["seconds"] = place + (shuffle or 0) / 7
        (folder / path).write_text(json.dumps(content))
    (folder / "suite.json").write_text(json.dumps(suite(cells, title)))
    return folder
