"""Measure AMDET on zoos of text encoders.

    gazeguard lab encoder --kind clip --out runs/encoders/clip   (and siglip, longclip)
    gazeguard lab encoder-zoo --spec src/gazeguard/bench/zoos/clip.toml
        --base clip=runs/encoders/clip
        --out runs/encoders/zoo-clip                             (and siglip, longclip)
    python -m gazeguard.bench.amdet runs/encoders/zoo-* --anchor clip=runs/encoders/clip ...

The benign `design` models of a kind are the references of all models of this kind; only `held-out`
models are measured, so no threshold was fitted on them. Five rules judge the same scans:

`references` what `gazeguard scan --reference` does: the leverage's rank among the references';
`score`      the same with the score, whatever ordinary prompts did: what leverage adds;
`threshold`  what `gazeguard scan` does without references: the leverage against a constant;
`gates`      the paper's four gates with calibrated thresholds: each value's rank among the
             references must be as high. All four at once happens to a benign encoder at most as
             often as any one of them;
`published`  the paper's constants, without references.

A model that cannot be measured is not flagged and ranks lowest. Attacks that failed the zoo's gate
are left out and listed; adaptive attackers are reported apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from gazeguard.bench.amdet_scans import Entry, Seen, read_entries, see_all
from gazeguard.bench.entropy_measures import Scored, measures, share
from gazeguard.bench.speed.instruments import machine
from gazeguard.calibrate import p_values, supported_alpha
from gazeguard.data.grammar import prompts as grammar
from gazeguard.errors import UsageError
from gazeguard.files import write_json
from gazeguard.lab.text.attack import JUDGE_SEED, target_of
from gazeguard.lab.text.teacher import Teacher, minilm
from gazeguard.lab.text.train import outputs
from gazeguard.lab.text.zoo import EncoderModel, goal_of, read_bases
from gazeguard.methods.amdet import Gate, References, Settings
from gazeguard.methods.amdet.decision import decide, gates_of
from gazeguard.models.encoders.load import load_encoder
from gazeguard.types import Outcome

RULES = ("references", "score", "threshold", "gates", "published")
LOWEST = -2.0  # below every score: of models that cannot be measured
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Yard:
    """What encoders of one kind are measured against.

    Attributes:
        references: leverages of benign design models, and the alpha that they carry.
        scores: their scores.
        gates: gate -> its values on the same models.
    """

    references: References
    scores: list[float]
    gates: dict[str, list[float]]


def yard_of(entries: Sequence[Entry], seen: Mapping[str, Seen], alpha: float) -> Yard:
    """The references among a kind's models; alpha is raised to what so many of them carry.

    Raises:
        UsageError: there are none.
    """
    known = [
        seen[entry["model"]]
        for entry in entries
        if (entry["truth"], entry["split"]) == ("benign", "design")
    ]
    held = [(one, _gates(one)) for one in known if one.held is not None]
    if not held:
        kind = entries[0]["recipe"]["kind"]
        raise UsageError(f"the zoo has no measurable benign design model of kind {kind}.")
    level = max(alpha, supported_alpha(len(held)))
    names = [gate.name for gate in held[0][1]]
    values = {name: [gates[i].value for _, gates in held] for i, name in enumerate(names)}
    scores = [one.held.score for one, _ in held if one.held is not None]
    return Yard(References(tuple(one.leverage for one, _ in held), level), scores, values)


def judged(entry: Entry, seen: Seen, yard: Yard) -> Row:
    """One model by every rule: `flagged`, and the `rank` that AUROC sorts by."""
    row = {key: entry[key] for key in ("model", "truth", "target_cosine", "drift", "recipe")}
    row["seconds"] = seen.seconds
    if seen.held is None:
        lost = {rule: {"flagged": False, "rank": LOWEST} for rule in RULES}
        nothing = dict.fromkeys(("score", "leverage", "p_value"))
        return row | nothing | {"natural": False, "gates": {}, "rules": lost}
    gates, settings, level = _gates(seen), Settings(), yard.references.alpha
    constants = replace(settings, gates=True)
    score, p = seen.held.score, yard.references.p_value(seen.leverage)
    each = {gate.name: _rank(yard.gates[gate.name], gate.value) for gate in gates}
    calibrated = decide(seen.held, gates, settings, yard.references, seen.drift)
    plain = decide(seen.held, gates, settings, drift=seen.drift)
    published = decide(seen.held, gates, constants, drift=seen.drift)
    assert published.suspicion is not None
    worst = max(each.values())
    rules = {
        "references": {
            "flagged": calibrated.outcome is Outcome.FLAGGED,
            "rank": seen.leverage,
            "outcome": str(calibrated.outcome),
        },
        "score": {
            "flagged": _rank(yard.scores, score) <= level and score > settings.floor,
            "rank": score,
        },
        "threshold": {
            "flagged": plain.outcome is Outcome.FLAGGED,
            "rank": seen.leverage,
            "outcome": str(plain.outcome),
        },
        "gates": {"flagged": worst <= level, "rank": 1 - worst},
        "published": {
            "flagged": published.outcome is Outcome.FLAGGED,
            "rank": published.suspicion,
            "outcome": str(published.outcome),
        },
    }
    return row | {
        "score": score,
        "leverage": seen.leverage,
        "p_value": p,
        "natural": "natural backdoor" in plain.reason,
        "gates": {
            gate.name: {
                "value": _number(gate.value),
                "p_value": each[gate.name],
                "passed": gate.passed,
            }
            for gate in gates
        },
        "rules": rules,
    }


def recovered(
    entries: Sequence[Entry], seen: Mapping[str, Seen], anchor: Path, teacher: Teacher
) -> dict[str, Row]:
    """How near the found target is to the planted one; backdoored model name -> numbers.

    `cosine` is that of the found target to the true one, `usual` the mean cosine of ordinary
    prompts to the true one, `nearest` the place (from 1) of the first of the trigger's tokens among
    the ten vocabulary tokens nearest to the found embedding, None when it is not there.
    """
    clean = load_encoder(anchor)
    ordinary = outputs(clean, grammar(200, JUDGE_SEED))
    found = {}
    for entry in entries:
        held = seen[entry["model"]].held
        if entry["truth"] == "benign" or held is None:
            continue
        recipe = EncoderModel(**entry["recipe"])
        target = target_of(clean, recipe.planted, goal_of(recipe, teacher))[0]
        planted = {word for trigger in entry["triggers"] for word in trigger.split()}
        places = [i for i, (word, _) in enumerate(seen[entry["model"]].tokens) if word in planted]
        found[entry["model"]] = {
            "cosine": float(torch.from_numpy(held.target) @ target),
            "usual": float((ordinary @ target).mean()),
            "nearest": places[0] + 1 if places else None,
        }
    return found


def evaluate(entries: Sequence[Entry], seen: Mapping[str, Seen], alpha: float) -> dict[str, Any]:
    """Every number but those of `recovered`.

    Raises:
        UsageError: a kind has too few models.
    """
    kinds = list(dict.fromkeys(entry["recipe"]["kind"] for entry in entries))
    rows: dict[str, list[Row]] = {}
    shy: list[Row] = []
    parts: dict[str, Any] = {}
    yards = {}
    for kind in kinds:
        mine = [entry for entry in entries if entry["recipe"]["kind"] == kind]
        yards[kind] = yard = yard_of(mine, seen, alpha)
        told = [judged(e, seen[e["model"]], yard) for e in mine if e["split"] == "held-out"]
        rows[kind] = [row for row in told if not row["recipe"]["adaptive"]]
        shy += [row for row in told if row["recipe"]["adaptive"]]
        if {row["truth"] for row in rows[kind]} != {"benign", "backdoored"}:
            raise UsageError(f"the zoo has no usable benign and backdoored held-out {kind} models.")
        parts[kind] = {
            "references": len(yard.references.leverages),
            "alpha": yard.references.alpha,
            "left_out": yard.references.left_out(),
            "rules": {rule: _measures([rows[kind]], rule) for rule in RULES},
        }
    every = [row for kind in kinds for row in rows[kind]]
    bad = [row for row in every if row["truth"] == "backdoored"]
    levels = {kind: yards[kind].references.alpha for kind in kinds}
    return {
        "kinds": parts,
        "overall": {rule: _measures(list(rows.values()), rule) for rule in RULES},
        "gates": {
            name: _one_gate(list(rows.values()), name, levels) for name in yards[kinds[0]].gates
        },
        "adaptive": {
            rule: {"recall": _flagged(shy, rule), "recall_with_others": _flagged(shy + bad, rule)}
            for rule in RULES
        },
        "natural": sum(row["natural"] for row in every if row["truth"] == "benign"),
        "seconds": _seconds([*every, *shy]),
        "models": [*every, *shy],
    }


def _gates(seen: Seen) -> tuple[Gate, ...]:
    assert seen.held is not None
    return gates_of(seen.held, seen.positive)


def _number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return value if np.isfinite(value) else None


def _rank(references: list[float], value: float) -> float:
    """Conformal p-value of a gate's value; 1 when it is not a number."""
    known = [number for number in references if np.isfinite(number)]
    return float(p_values(known, [value])[0]) if np.isfinite(value) else 1.0


def _measures(kinds: Sequence[Sequence[Row]], rule: str) -> dict[str, Any]:
    """AUROC, F1, precision, recall, false alarms of a rule, with intervals."""
    zoos = []
    for rows in kinds:
        truth = np.array([row["truth"] == "backdoored" for row in rows])
        rank = np.array([row["rules"][rule]["rank"] for row in rows])
        flagged = np.array([row["rules"][rule]["flagged"] for row in rows])
        zoos.append((truth, Scored(rank, np.where(flagged, 0.0, 1.0), rank)))
    found = measures(zoos, 0.5)
    del found["base_only"]  # the anchor is in the score already
    right = [
        row["truth"] == "backdoored"
        for rows in kinds
        for row in rows
        if row["rules"][rule]["flagged"]
    ]
    return found | {"precision": share(np.array(right)) if right else None}


def _one_gate(
    kinds: Sequence[Sequence[Row]], name: str, levels: Mapping[str, float]
) -> dict[str, Any]:
    """What a single gate tells: by its calibrated threshold, and by the published one."""

    def alone(row: Row) -> Row:
        gate = row["gates"].get(name)
        if gate is None or gate["value"] is None:
            return row | {"rules": {name: {"flagged": False, "rank": LOWEST}}}
        flagged = gate["p_value"] <= levels[row["recipe"]["kind"]]
        return row | {"rules": {name: {"flagged": flagged, "rank": gate["value"]}}}

    found = _measures([[alone(row) for row in rows] for rows in kinds], name)
    passed = {
        truth: [
            bool(row["gates"] and row["gates"][name]["passed"])
            for rows in kinds
            for row in rows
            if row["truth"] == truth
        ]
        for truth in ("benign", "backdoored")
    }
    kept = {key: found[key] for key in ("auroc", "recall", "false_alarms")}
    return kept | {f"published_{truth}": share(np.array(said)) for truth, said in passed.items()}


def _flagged(rows: Sequence[Row], rule: str) -> dict[str, float] | None:
    return share(np.array([row["rules"][rule]["flagged"] for row in rows])) if rows else None


def _seconds(rows: Sequence[Row]) -> dict[str, float]:
    took = [row["seconds"] for row in rows]
    return {"median": float(np.median(took)), "most": max(took)}


_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("zoos", type=_FOLDER, nargs=-1, required=True)
@click.option("--anchor", "anchors", multiple=True, required=True, metavar="KIND=DIR")
@click.option("--out", type=_FOLDER, default=Path("bench/results/amdet"), show_default=True)
@click.option("--work", type=_FOLDER, default=Path("runs/amdet"), help="Finished scans go here.")
@click.option("--alpha", default=0.05, show_default=True, help="Raised to what references carry.")
@click.option("--rule", type=click.Choice(["robust", "paper"]), default="robust", help="Of search.")
@click.option("--prompts", type=int, help="Instead of the rule's.")
@click.option("--steps", type=int, help="At most so many.")
@click.option("--name", default="encoders", show_default=True, help="Of the result.")
@click.option("--threads", default=2, show_default=True)
def main(
    zoos: tuple[Path, ...],
    anchors: tuple[str, ...],
    out: Path,
    work: Path,
    alpha: float,
    rule: str,
    prompts: int | None,
    steps: int | None,
    name: str,
    threads: int,
) -> None:
    """Scan and evaluate the encoders of ZOOS."""
    torch.set_num_threads(threads)
    settings = Settings(steps=steps) if rule == "robust" else Settings.published(steps=steps)
    if prompts is not None:
        settings = replace(settings, prompts=prompts)
    usable: list[Entry] = []
    failed: list[Entry] = []
    seen: dict[str, Seen] = {}
    try:
        clean = read_bases(anchors)
        for zoo in zoos:
            entries = read_entries(zoo, clean)
            passed = [entry for entry in entries if entry["passed"]]
            seen |= see_all(zoo, passed, clean, settings, work, click.echo)
            usable += passed
            failed += [entry for entry in entries if not entry["passed"]]
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    result = evaluate(usable, seen, alpha)
    teacher = minilm()
    near: dict[str, Row] = {}
    for kind in result["kinds"]:
        mine = [entry for entry in usable if entry["recipe"]["kind"] == kind]
        near |= recovered(mine, seen, clean[kind], teacher)
    for row in result["models"]:
        row["recovered"] = near.get(row["model"])
    lost = ("target_cosine", "drift", "recipe")
    result |= {
        "zoo": f"{name}-{rule}",
        "settings": settings.as_dict(),
        "failed_attacks": [{k: e[k] for k in lost} for e in failed],
        "machine": machine(threads),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{result['zoo']}.json"
    write_json(path, result)
    for judge, got in result["overall"].items():
        click.echo(
            f"{judge}: AUROC {got['auroc']['value']:.3f}, F1 {got['f1']['value']:.3f}, recall"
            f" {got['recall']['value']:.3f}, false alarms {got['false_alarms']['value']:.3f}"
        )
    click.echo(f"{path}")


if __name__ == "__main__":
    main()
