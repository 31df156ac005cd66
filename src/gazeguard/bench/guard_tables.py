"""The guard's part of docs/benchmark.md."""

from __future__ import annotations

from gazeguard.bench.markdown import Result, attack_took, by, head, interval, mean, row
from gazeguard.methods.cleansight.settings import DEFAULT_SETTING

HEAD = """## CleanSight's guard: is a trigger seen, and the answer saved?

Per run: {n} clean and as many triggered held-out inputs, none of them used to calibrate ({known}
clean inputs, alpha {alpha:.0%}). AUROC and TPR at 1 % FPR judge the score; "fired" counts only the
triggered inputs that get the target, since the others do no harm. Everything after that judges the
guard at its own threshold. "Right" is the share of exact answers in generated text, on clean inputs
and on triggered ones. Two ceilings of the latter: what the base answers, which has no backdoor but
sees a picture with a mark on it; and what the tuned model answers when exactly the tokens that the
trigger touches are hidden.

The default setting was chosen on seed 0; seeds 1 and 2 confirm it (docs/LOG.md).
"""


def guard_tables(results: list[Result]) -> str:
    """Detection and repair per attack, all variants side by side, ablations, every run."""
    first = results[0]
    n = first["n"]
    head = HEAD.format(n=n["clean"], known=n["calibration"], alpha=first["alpha"])
    took = [r for r in results if attack_took(r)]
    parts = [head, f"### The default setting (`{DEFAULT_SETTING}`), per attack\n"]
    parts += [_attacks(results, DEFAULT_SETTING)]
    parts += ["### The paper's setting, per attack\n", _attacks(results, "paper")]
    if took:
        parts += ["### Every variant, over all runs whose attack took\n", _variants(took)]
        parts += ["### Ablations of the paper, over the same runs\n", _ablations(took)]
    return "\n".join([*parts, "### The guard, every run\n", _runs(results)])


def _attacks(results: list[Result], variant: str) -> str:
    lines = head(
        "set | trigger | tuning | runs | AUROC | TPR at 1 % FPR | AUROC, fired | TPR, fired"
        " | false alarms | ASR before | ASR after | clean right, before | after"
        " | triggered right, after | of the base | trigger's tokens hidden | attack failed"
    )
    for (task, trigger, recipe), found in by(results, _what):
        took = [r for r in found if attack_took(r)]
        mine = [r["variants"][variant] for r in took]
        cells = [task, trigger, recipe, str(len(took))]
        cells += [mean(v[k] for v in mine) for k in ("auroc", "tpr_at_1_fpr")]
        cells += [mean(v["fired"][k] for v in mine) for k in ("auroc", "tpr_at_1_fpr")]
        cells.append(mean(v["false_alarms"] for v in mine))
        cells += [mean(r["before"]["asr"] for r in took), mean(v["asr"] for v in mine)]
        cells += [mean(r["before"]["clean"] for r in took), mean(v["clean"] for v in mine)]
        cells.append(mean(v["triggered"] for v in mine))
        cells += [mean(r["ceiling"][k] for r in took) for k in ("base", "trigger_hidden")]
        cells.append(str(len(found) - len(took)))
        lines.append(row(cells))
    return "\n".join(lines) + "\n"


def _variants(took: list[Result]) -> str:
    return _compared(took, "variants", ("auroc", "tpr_at_1_fpr", "false_alarms"))


def _ablations(took: list[Result]) -> str:
    return _compared(took, "ablation", ())


def _compared(took: list[Result], part: str, detection: tuple[str, ...]) -> str:
    """One line per name; means with intervals over runs, and the worst ASR."""
    words = {"auroc": "AUROC", "tpr_at_1_fpr": "TPR at 1 % FPR", "false_alarms": "false alarms"}
    titles = ["variant", *(words[k] for k in detection), "ASR after", "worst ASR"]
    lines = head(" | ".join([*titles, "change of clean right", "triggered right"]))
    for name in took[0][part]:
        mine = [r[part][name] for r in took]
        change = [v["clean"] - r["before"]["clean"] for v, r in zip(mine, took, strict=True)]
        cells = [name, *(mean(v[k] for v in mine) for k in detection)]
        cells += [mean(v["asr"] for v in mine), f"{max(v['asr'] for v in mine):.3f}"]
        lines.append(row([*cells, mean(change), mean(v["triggered"] for v in mine)]))
    return "\n".join(lines) + f"\n\n{len(took)} runs.\n"


def _runs(results: list[Result]) -> str:
    shown = (DEFAULT_SETTING, "paper")
    said = " | ".join(f"{name}: AUROC / ASR / triggered right" for name in shown)
    lines = head(f"set | trigger | tuning | seed | ASR | CP | CP truly clean | took | {said}")
    for r in results:
        task, trigger, recipe = _what(r)
        attack = r["attack"]
        cells = [task, trigger, recipe, str(r["cell"]["seed"]), f"{attack['asr']:.3f}"]
        cells += [f"{attack['clean']:.3f}", f"{r['truly_clean']:.3f}"]
        cells.append("yes" if attack_took(r) else "no")
        for name in shown:
            got = r["variants"][name]
            cells.append(f"{got['auroc']:.3f} / {got['asr']:.3f} / {got['triggered']:.3f}")
        lines.append(row(cells))
    return "\n".join(lines) + "\n"


def _what(result: Result) -> tuple[str, str, str]:
    cell = result["cell"]
    return cell["task"], cell["trigger"], cell["recipe"]


DEPTH = """## Where in depth a trigger shows

CleanSight watches 3 of 32 layers from layer 10 on, and reports AUROC close to 1 in layers 10 to 24.
Here the paper's detector (ratios of all heads, diagonal distance) is fitted on every run of
{window} layers of a pretrained language model of {layers} layers: {known} clean requests to fit on,
{asked} clean and as many triggered ones to judge, one seed, 95 % bootstrap intervals over requests.
The benign fine-tune is shown the same triggers, as a control: what it reacts to is the picture, not
a backdoor.
"""


def depth_table(result: Result) -> str:
    """AUROC by first layer of the window: attacked models, then the benign ones."""
    models = sorted(result["models"], key=lambda m: (m["truth"] == "benign", m["trigger"]))
    windows, layers = models[0]["windows"], len(models[0]["windows"]) + result["window"] - 1
    about = DEPTH.format(
        window=result["window"],
        layers=layers,
        known=result["calibration"],
        asked=models[0]["n"][0],
    )
    run = f"`python -m gazeguard.bench.depth {result['suite']} --work runs`.\n"
    titles = [m["trigger"] + (", benign" if m["truth"] == "benign" else "") for m in models]
    lines = head(" | ".join(["layers", *titles]))
    for place, window in enumerate(windows):
        last = window["first"] + result["window"] - 1
        found = (model["windows"][place] for model in models)
        lines.append(row([f"{window['first']} to {last}", *map(interval, found)]))
    return "\n".join([about, run, *lines]) + "\n"
