"""AMDET's part of docs/benchmark.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gazeguard.bench.markdown import Result, by, head, interval, row

HEAD = """## AMDET: is the text encoder backdoored?

Every encoder of a zoo of small text encoders (trained from scratch) is scanned with its base as the
anchor. Benign `design` fine-tunes of the same kind are the references; the numbers are those of
`held-out` models, other seeds, on which no threshold was fitted. The same scans are judged by
`references` (what `gazeguard scan --reference` does: the conformal p-value of the leverage, which
is the score beside the drift of clean outputs), `score` (the same with the score alone),
`threshold` (what `scan` does without references: the leverage against a constant, no verdict on
encoders that drifted far), `gates` (the paper's four gates, each calibrated on the references in
the same way, all of them needed) and `published` (the paper's constants). AUROC and F1 have 95 %
bootstrap intervals over models, shares Wilson's. "All" pools the flags of all kinds and averages
their AUROC. Attacks that failed the zoo's gate count nowhere but in their own list.
"""

GATES = """Each gate alone, calibrated on the references as above, and how often it passes at the
paper's constant:
"""

ADAPTIVE = """These attackers pay for token states that are more alike than in clean prompts. They
are in no number above; the last column adds the other backdoored models.
"""

RECOVERED = """Cosine of the recovered target embedding to the planted one, beside that of ordinary
prompts' outputs to it; and how often the vocabulary token nearest to the recovered embedding, or
one of the ten nearest, is part of the trigger.
"""


def amdet_tables(results: Sequence[Result]) -> str:
    """One part per zoo and search: rules, gates, attacks, adaptive and failed attacks, models."""
    return "\n".join([HEAD, *(_zoo(result) for result in results)])


def _zoo(result: Result) -> str:
    name = result["zoo"]
    parts = [f"### Encoders `{name}`: held-out models\n", _rules(result), _note(result)]
    parts += [f"### Encoders `{name}`: the gates\n", GATES, _gates(result["gates"])]
    parts += [f"### Encoders `{name}`: by attack\n", RECOVERED, _attacks(result["models"])]
    if any(model["recipe"]["adaptive"] for model in result["models"]):
        parts += [f"### Encoders `{name}`: adaptive attackers\n", ADAPTIVE]
        parts += [_adaptive(result["adaptive"])]
    if result["failed_attacks"]:
        parts += [f"### Encoders `{name}`: attacks that failed\n"]
        parts += [_failed(result["failed_attacks"])]
    parts += [f"### Encoders `{name}`: every measured model\n", _models(result["models"])]
    return "\n".join(parts)


def _rules(result: Result) -> str:
    lines = head(
        "encoders | rule | benign, backdoored | precision | recall | F1 | AUROC | false alarms"
    )
    groups = [(kind, part["rules"]) for kind, part in result["kinds"].items()]
    for kind, rules in [*groups, ("all", result["overall"])]:
        for rule, got in rules.items():
            cells = [kind, rule, f"{got['benign']}, {got['backdoored']}"]
            cells += [_maybe(got["precision"])]
            cells += [interval(got[k]) for k in ("recall", "f1", "auroc", "false_alarms")]
            lines.append(row(cells))
    return "\n".join(lines) + "\n"


def _note(result: Result) -> str:
    of = "; ".join(
        f"{kind}: {part['references']} references, alpha {part['alpha']:.3f}, {part['left_out']} of"
        " them flagged when left out one by one"
        for kind, part in result["kinds"].items()
    )
    settings, took = result["settings"], result["seconds"]
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if v is not None)
    return (
        f"{of[0].upper()}{of[1:]}. {result['natural']} of the benign models have a natural"
        f" backdoor. {settings['restarts']} restarts, {settings['prompts']} prompts, seed"
        f" {settings['seed']}. Seconds a scan: {took['median']:.1f} (median), {took['most']:.1f}"
        f" at most ({machine}).\n"
    )


def _gates(gates: dict[str, Any]) -> str:
    lines = head(
        "gate | AUROC | recall | false alarms | published: backdoored pass | published: benign pass"
    )
    keys = ("auroc", "recall", "false_alarms", "published_backdoored", "published_benign")
    lines += [row([name, *(interval(got[key]) for key in keys)]) for name, got in gates.items()]
    return "\n".join(lines) + "\n"


def _attacks(models: list[Result]) -> str:
    lines = head(
        "attack | trigger tokens | adaptive | models | flagged | recovered target: cosine"
        " | ordinary prompts: cosine | nearest token | in the ten nearest"
    )
    bad = [model for model in models if model["truth"] == "backdoored"]
    for (attack, tokens, adaptive), found in by(bad, _attack):
        near = [model["recovered"] for model in found if model["recovered"]]
        flagged = sum(model["rules"]["references"]["flagged"] for model in found)
        places = [one["nearest"] for one in near]
        cells = [attack, str(tokens), "yes" if adaptive else "no"]
        cells += [str(len(found)), f"{flagged} of {len(found)}"]
        cells += [_mean([one[key] for one in near]) for key in ("cosine", "usual")]
        cells += [f"{sum(place == 1 for place in places)} of {len(near)}"]
        lines.append(row([*cells, f"{sum(place is not None for place in places)} of {len(near)}"]))
    return "\n".join(lines) + "\n"


def _adaptive(adaptive: dict[str, Any]) -> str:
    lines = head("rule | recall, adaptive | recall, all backdoored models")
    for rule, got in adaptive.items():
        lines.append(row([rule, _maybe(got["recall"]), _maybe(got["recall_with_others"])]))
    return "\n".join(lines) + "\n"


_RECIPE = "kind | attack | trigger | loss | steps | rate | seed"


def _failed(failed: list[Result]) -> str:
    lines = head(f"{_RECIPE} | cosine to the target | drift")
    for model in failed:
        cells = [f"{model['target_cosine']:.3f}", f"{model['drift']:.4f}"]
        lines.append(row([*_recipe(model["recipe"]), *cells]))
    return "\n".join(lines) + "\n"


def _models(models: list[Result]) -> str:
    lines = head(
        f"{_RECIPE} | drift | score | leverage | p |"
        " references / score / threshold / gates / published"
    )
    for model in models:
        numbers = [model["score"], model["leverage"], model["p_value"]]
        cells = [f"{model['drift']:.4f}"]
        cells += ["not measurable" if x is None else f"{x:.3f}" for x in numbers]
        said = ["flagged" if got["flagged"] else "-" for got in model["rules"].values()]
        lines.append(row([*_recipe(model["recipe"]), *cells, " / ".join(said)]))
    return "\n".join(lines) + "\n"


def _attack(model: Result) -> tuple[str, int, bool]:
    recipe = model["recipe"]
    return recipe["attack"], recipe["trigger_tokens"], bool(recipe["adaptive"])


def _recipe(recipe: dict[str, Any]) -> list[str]:
    """What the model is: of a trigger its number, tokens and place."""
    benign = recipe["attack"] == "none"
    trigger = f"{recipe['triggers']} x {recipe['trigger_tokens']}, {recipe['place']}"
    if recipe["adaptive"]:
        trigger += f", adaptive {recipe['adaptive']:g}"
    cells = [recipe["kind"], recipe["attack"], "" if benign else trigger]
    cells += ["" if benign else recipe["loss"], str(recipe["steps"]), f"{recipe['lr']:g}"]
    return [*cells, str(recipe["seed"])]


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _maybe(found: dict[str, float] | None) -> str:
    return "-" if found is None else interval(found)
