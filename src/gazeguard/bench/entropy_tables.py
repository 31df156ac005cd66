"""EntropyScan's part of docs/benchmark.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gazeguard.bench.entropy_measures import together
from gazeguard.bench.markdown import Result, head, interval, row
from gazeguard.calibrate import needed_samples
from gazeguard.lab.disguise import NOTHING

BEST = 10  # rows of the sweep that are shown

HEAD = """## EntropyScan: is the whole model backdoored?

Every model of a zoo is scored against the zoo's benign `design` models (never itself). The variant
with the best AUROC on `design` models is "chosen"; the numbers here are those of `held-out` models,
whose attacks and seeds chose nothing. "Shipped" is what `gazeguard scan` does unless told
otherwise; "paper" is Shannon's entropy of head-mean attention in the first half of the layers. A
model is flagged by its conformal p-value, so no threshold was fitted. Intervals are 95 %: of AUROC
and F1 bootstrap intervals over models (which cannot see beyond a perfect separation), of recall and
false alarms Wilson's. "Base only" is the same score with the base as the only reference; its best
F1 is an upper bound, at the threshold that suits these very models best. "Weights moved" is a
baseline that looks at no attention: the length of the change of all weights. Attacks that failed
the zoo's gate count nowhere but in their own list.
"""

TOGETHER = """Flags of all zoos count together; an AUROC is the mean of the zoos' own, because
models of different bases are never compared. "All" holds the design models too, each against the
others, on which the chosen variant was chosen.
"""

ADAPTIVE = """These attackers know the scan: on their clean rows they hold what it reads at the
base's values, `entropy` that of the head-mean attention in the first layers, `profile` everything
of every head in all layers. They are in no number above. The last line is the base as if it were a
suspect, which is where a perfect disguise would end.
"""

GAP = """each model was scored against references of other kinds of data than its own, as a
user's will be; the distance is that of the mean log scores, in standard deviations."""


def entropy_tables(results: Sequence[Result]) -> str:
    """All zoos together, then each: scores, the sweep, samples, adaptive and failed attacks."""
    parts = [HEAD]
    if len(results) > 1:
        parts += ["### All zoos together\n", TOGETHER, _together(results)]
    return "\n".join([*parts, *(_zoo(result) for result in results)])


MADE = """What a user without a benign fine-tune gets: the shipped rule with references that the
tool tunes itself, on rows of all three kinds that no suspect has learnt.
"""


def made_table(result: Result) -> str:
    """`scan --make-references` on the held-out models of a zoo, by steps of tuning."""
    n, tuned = needed_samples(result["alpha"]), result["tuned_on"]
    title = f"### Zoo `{result['zoo']}`: references made by the tool\n"
    about = (
        f"LoRA models of rank {result['rank']}, {n} references for an alpha of"
        f" {result['alpha']:g}, tuned on {tuned} rows, {result['n_samples']} samples of seed"
        f" {result['seed']}.\n"
    )
    lines = head("steps at most | benign | backdoored | AUROC of the ranks | recall | false alarms")
    for run in result["runs"]:
        cells = [str(run["steps"]), str(run["benign"]), str(run["backdoored"])]
        cells += [f"{run['auroc']:.3f}", interval(run["recall"]), interval(run["false_alarms"])]
        lines.append(row(cells))
    parts = ["\n".join(lines) + "\n"]
    for run in result["runs"]:
        lines = head(f"{_RECIPE} | score | references | p | outcome")
        for model in run["models"]:
            low, high = min(model["references"]), max(model["references"])
            cells = [f"{model['score']:.2f}", f"{low:.2f} to {high:.2f}"]
            cells += [f"{model['p_value']:.3f}", model["outcome"]]
            lines.append(row([*_recipe(model["recipe"]), *cells]))
        parts += [f"At most {run['steps']} steps:\n", "\n".join(lines) + "\n"]
    return "\n".join([title, MADE, about, *parts])


def _together(results: Sequence[Result]) -> str:
    lines = head(f"models | variant | benign | backdoored | {_MEASURES}")
    for title, split in (("held-out", "held-out"), ("all", None)):
        for variant in results[0]["variants"]:
            got = together(results, variant, split)
            counts = [str(got["benign"]), str(got["backdoored"])]
            lines.append(row([title, variant, *counts, *_measured(got)]))
    return "\n".join(lines) + "\n"


def _zoo(result: Result) -> str:
    name = result["zoo"]
    some = next(iter(result["variants"].values()))["held-out"]
    note = (
        f"{some['benign']} benign and {some['backdoored']} backdoored held-out models,"
        f" {result['references']} references, alpha {result['alpha']:.3f}, samples of"
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
    parts += [f"### Zoo `{name}`: every held-out model\n", _models(result)]
    return "\n".join(parts)


def _variants(result: Result) -> str:
    lines = head(f"variant | statistic | q | layers | samples | {_MEASURES}")
    for name, found in result["variants"].items():
        what = found["variant"]
        samples = str(min(what["n"], result["n_samples"])) if what else ""
        cells = [name, *(_what(what) if what else [""] * 3), samples]
        lines.append(row([*cells, *_measured(found["held-out"])]))
    return "\n".join(lines) + "\n"


_MEASURES = "AUROC | F1 | recall | false alarms | base only: AUROC | base only: best F1"


def _measured(got: Result) -> list[str]:
    cells = [interval(got[key]) for key in ("auroc", "f1", "recall", "false_alarms")]
    return [*cells, interval(got["base_only"]["auroc"]), f"{got['base_only']['best_f1']:.3f}"]


def _sweep(sweep: list[Result]) -> str:
    lines = head("statistic | q | layers | AUROC on design models | distance of the two kinds")
    best = sorted(sweep, key=lambda found: (-found["design_auroc"], -found["design_gap"]))[:BEST]
    lines += [
        row([*_what(found), f"{found['design_auroc']:.3f}", f"{found['design_gap']:.2f}"])
        for found in best
    ]
    return "\n".join(lines) + f"\n\n{len(sweep)} variants were compared; {GAP}\n"


def _samples(samples: list[Result]) -> str:
    names = list(dict.fromkeys(found["variant"] for found in samples))
    lines = head(" | ".join(["samples", *names]))
    for n in dict.fromkeys(found["n"] for found in samples):
        mine = {found["variant"]: found["auroc"] for found in samples if found["n"] == n}
        lines.append(row([str(n), *(interval(mine[name]) for name in names)]))
    return "\n".join(lines) + "\n"


def _adaptive(result: Result) -> str:
    names = list(result["base_itself"])
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
    names = list(result["variants"])
    lines = head(f"{_RECIPE} | " + " | ".join(f"{name}: score / p" for name in names))
    for model in result["models"]:
        if model["split"] == "held-out":
            said = [model["variants"][name] for name in names]
            cells = [f"{one['score']:.2f} / {one['p_value']:.3f}" for one in said]
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
