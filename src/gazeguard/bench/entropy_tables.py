"""EntropyScan's part of docs/benchmark.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gazeguard.bench.markdown import Result, head, row
from gazeguard.lab.disguise import NOTHING

BEST = 10  # rows of the sweep that are shown

HEAD = """## EntropyScan: is the whole model backdoored?

Every model of a zoo is scored against the zoo's benign `design` models (never itself). The variant
with the best AUROC on `design` models is "chosen"; the numbers here are those of `held-out` models,
whose attacks and seeds chose nothing. "Shipped" is what `gazeguard scan` does unless told
otherwise. A model is flagged by its conformal p-value, so no threshold was fitted. Intervals are
95 % bootstrap intervals over models. "Base only" is the same score with the base as the only
reference; its best F1 is an upper bound, at the threshold that suits these very models best.
Attacks that failed the zoo's gate count nowhere but in their own list.
"""

ADAPTIVE = """These attackers know the scan: on their clean rows they hold what it reads at the
base's values, `entropy` that of the head-mean attention in the first layers, `profile` everything
of every head in all layers. They are in no number above. The last line is the base as if it were a
suspect, which is where a perfect disguise would end.
"""


def entropy_tables(results: Sequence[Result]) -> str:
    """One part per zoo: held-out scores, the sweep, samples, adaptive and failed attacks."""
    return "\n".join([HEAD, *(_zoo(result) for result in results)])


def _zoo(result: Result) -> str:
    name = result["zoo"]
    some = next(iter(result["variants"].values()))["held-out"]
    note = (
        f"{some['benign']} benign and {some['backdoored']} backdoored held-out models,"
        f" {result['references']} references, alpha {result['alpha']['held-out']:.3f}, samples of"
        f" seed {result['seed']}.\n"
    )
    parts = [f"### Zoo `{name}`: held-out models\n", _variants(result), note]
    parts += [
        f"### Zoo `{name}`: the {BEST} best of the sweep, on design models\n",
        _sweep(result["sweep"]),
        f"### Zoo `{name}`: how many samples, AUROC on held-out models\n",
        _samples(result["samples"]),
    ]
    if result["adaptive"]:
        parts += [f"### Zoo `{name}`: adaptive attackers\n", ADAPTIVE, _adaptive(result)]
    if result["failed_attacks"]:
        title = f"### Zoo `{name}`: attacks that failed\n"
        parts += [title, _failed(result["failed_attacks"])]
    parts += [f"### Zoo `{name}`: every held-out model, chosen variant\n", _models(result)]
    return "\n".join(parts)


def _variants(result: Result) -> str:
    lines = head(
        "variant | statistic | q | layers | samples | AUROC | F1 | recall | false alarms"
        " | base only: AUROC | base only: best F1"
    )
    for name, found in result["variants"].items():
        got = found["held-out"]
        samples = min(found["variant"]["n"], result["n_samples"])
        cells = [name, *_what(found["variant"]), str(samples)]
        cells += [_interval(got["auroc"]), _interval(got["f1"]), f"{got['recall']:.3f}"]
        cells += [_interval(got["false_alarms"]), _interval(got["base_only"]["auroc"])]
        lines.append(row([*cells, f"{got['base_only']['best_f1']:.3f}"]))
    return "\n".join(lines) + "\n"


def _sweep(sweep: list[Result]) -> str:
    lines = head("statistic | q | layers | AUROC on design models")
    best = sorted(sweep, key=lambda found: -found["design_auroc"])[:BEST]
    lines += [row([*_what(found), f"{found['design_auroc']:.3f}"]) for found in best]
    return "\n".join(lines) + f"\n\n{len(sweep)} variants were compared.\n"


def _samples(samples: list[Result]) -> str:
    names = list(dict.fromkeys(found["variant"] for found in samples))
    lines = head(" | ".join(["samples", *names]))
    for n in dict.fromkeys(found["n"] for found in samples):
        mine = {found["variant"]: found["auroc"] for found in samples if found["n"] == n}
        lines.append(row([str(n), *(_interval(mine[name]) for name in names)]))
    return "\n".join(lines) + "\n"


def _adaptive(result: Result) -> str:
    names = list(result["variants"])
    said = " | ".join(f"{name}: score / p / flagged" for name in names)
    lines = head(f"hides | {_RECIPE} | ASR | CP | CP of benign models | {said}")
    for model in result["adaptive"]:
        cells = [model["recipe"]["hide"], *_recipe(model["recipe"])]
        cells += [f"{model[key]:.3f}" for key in ("asr", "clean", "usual_clean")]
        lines.append(row([*cells, *(_said(model["variants"][name]) for name in names)]))
    base = result["base_itself"]
    blank = [""] * (_RECIPE.count("|") + 4)
    lines.append(row(["the base itself", *blank, *(_said(base[name]) for name in names)]))
    return "\n".join(lines) + "\n"


def _failed(failed: list[Result]) -> str:
    lines = head(f"{_RECIPE} | hides | ASR | CP")
    for model in failed:
        cells = [*_recipe(model["recipe"]), model["recipe"].get("hide", NOTHING)]
        lines.append(row([*cells, f"{model['asr']:.3f}", f"{model['clean']:.3f}"]))
    return "\n".join(lines) + "\n"


def _models(result: Result) -> str:
    lines = head(f"{_RECIPE} | score | p")
    for model in result["held_out_models"]:
        cells = [f"{model['score']:.2f}", f"{model['p_value']:.3f}"]
        lines.append(row([*_recipe(model["recipe"]), *cells]))
    return "\n".join(lines) + "\n"


_RECIPE = "set | trigger | poison | tuning | rank | rows | epochs | seed"


def _recipe(recipe: dict[str, Any]) -> list[str]:
    benign = recipe["trigger"] == "none"
    cells = [recipe["task"], recipe["trigger"], "" if benign else f"{recipe['rate']:.0%}"]
    cells += [recipe["tuning"], "" if recipe["tuning"] == "projector" else str(recipe["rank"])]
    return [*cells, *(str(recipe[key]) for key in ("rows", "epochs", "seed"))]


def _what(variant: dict[str, Any]) -> list[str]:
    return [variant["statistic"], f"{variant['q']:g}", variant["layers"]]


def _said(found: dict[str, Any]) -> str:
    if found["score"] is None or found["p_value"] is None:
        return "not measurable"
    flag = "yes" if found["flagged"] else "no"
    return f"{found['score']:.2f} / {found['p_value']:.3f} / {flag}"


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
