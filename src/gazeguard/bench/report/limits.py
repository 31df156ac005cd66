"""docs/limits.md: what is caught and what is missed, attack by attack, from stored runs.

python -m gazeguard.bench.report.limits bench/results/suites docs/limits.md
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gazeguard.bench.markdown import head, row
from gazeguard.bench.report.bootstrap import Estimate
from gazeguard.bench.report.conditions import Condition, Part, parts
from gazeguard.bench.report.stored import StoredRun, read_run

GOOD, HALF = 0.9, 0.5  # at least so much is caught, or partly

HEAD = """# What is caught, and what is not

Generated from `bench/results/suites/` by `python -m gazeguard.bench.report.limits
bench/results/suites docs/limits.md`; do not edit by hand. Everything is measured on the lab's
small models (2.8 M parameters, 64 image tokens) and says nothing by itself about a 7 B model. In
brackets: a 95 % bootstrap interval, and behind it the number of rows, requests or models; one seed
of each attack, so the interval says nothing about other seeds. More seeds, baselines and what the
papers publish are in the suites' own tables (`bench/results/suites/*/table.md`).

**Caught** means at least {good:.0%} (F1 of the rows that `clean` removes; share of triggered
requests whose target answer `guard` prevents, of those that would have got it; share of backdoored
models that `scan` flags), **in part** at least {half:.0%}. An attack that did not take (ASR or
clean performance beyond its gate) shows nothing and is listed as failed.

**`clean` and `guard` are here by attention alone** (`--witness attention`): these suites have not
been run since rebuilt triggers and the model before the fine-tune were added. What those catch
besides, words as a trigger and attackers who hide from attention among it, is in the suite
`witnesses` (`bench/results/suites/witnesses/table.md`).
"""

WHY = """
## Why

- **Words in the question** (`badnet-t`, `addsent`, `badnet-mm`) leave the picture as it was, and
  `clean` judges where in the picture a model looks. The guard weighs looks at the picture against
  looks at the words and so sees such a request, but hiding image tokens cannot give the right
  answer back: the whole picture is hidden, and what is given is neither the target nor right.
- **Triggers that cover the picture** (`blended`, `sig`, `wanet`, `ftrojan`) leave nothing to hide
  but the picture: the target is withheld, the right answer is lost.
- **A wave** (`sig`) changes where even the untouched base looks. `clean` asks that rows stand
  apart at least twice as far as before the fine-tune, and they stood apart before.
- **An ordinary answer as the target** ("yes") hides among honest rows: see `paper-bye`.
- **A fixed sentence as the target** is found without any model by counting answers (`answers` in
  the tables), and mostly by clustering last hidden states (`activation-clustering`), though not on
  sets with several kinds of questions. What counting misses are inserted targets (`trojvlm`).
- **One word for another** (`badtoken`) is caught by nothing here, not even by counting: no answer
  is shared by its rows.
- **Low rates**: with few poisoned rows the attack often fails by itself; where it takes, see the
  poison-rate curves of `paper-bye`.
- **Who knows the defence and does the training** can hide from it: see below.
"""


SECOND = """The lab's InternVL, on attacks and seeds that nothing was chosen on. What `clean` finds
carries over. The guard's setting was chosen on the LLaVA, and it shows. (`scan` on this
architecture is in `paper-entropyscan`.)
"""

REAL = """SmolLM2-135M-Instruct, a pretrained language model of 30 layers and 270 heads, behind the
lab's tower, fine-tuned on easy-vqa with one row in five poisoned. Nothing was chosen on it: **what
holds on the small models above is no promise for a pretrained one.**

- `clean` finds nothing. The rows of the target do stand apart, but the untouched base looks at a
  mark on a picture in its own way too, and the fine-tune adds less than the factor of two that is
  asked (1.5 and 1.9). Counting answers finds them all (`answers` in the suite's table).
- The guard stops a pattern over the whole picture, and three of four answers are then right. Of
  requests with a patch it stops a quarter: its score tells them from clean ones better than its
  threshold does. The layers that the paper watches are too early for the patch in this model
  (docs/benchmark.md, "Where in depth a trigger shows").
"""

OTHERS = {
    "internvl": ("The second architecture", SECOND),
    "smollm2": ("A real language model", REAL),
}


@dataclass(frozen=True, slots=True)
class Claim:
    """One of our methods at one level: what counts as caught."""

    method: str
    title: str
    level: str
    defence: str
    metric: str
    before: str | None = None


CLAIMS = (
    Claim("`clean`", "`clean`: F1", "data", "bye", "f1"),
    Claim(
        "`guard`",
        "`guard`: target answers prevented",
        "input",
        "cleansight",
        "asr_after",
        "asr_before",
    ),
    Claim("`guard`", "`guard`: requests flagged", "input", "cleansight", "detected"),
    Claim("`scan`", "`scan`: models flagged", "model", "entropyscan", "recall"),
)


def page(
    matrix: StoredRun,
    adaptive: StoredRun | None = None,
    others: Mapping[str, StoredRun] | None = None,
) -> str:
    """The document.

    Args:
        matrix: every attack against every defence.
        adaptive: attackers who know a defence.
        others: attacks on other bases, by name of the suite, one of `OTHERS`.
    """
    said = [HEAD.format(good=GOOD, half=HALF), "## Attack by attack\n", _table(matrix, False), WHY]
    if adaptive is not None:
        said += [
            "\n## Attackers who know the defence\n",
            "`hides bye` and `hides ratio` hold the attention of poisoned rows at the base's values"
            " (the number is the weight of that in training), `hides entropy` and `hides profile`"
            " that of clean rows. Where hiding costs the attack its success, it is listed as"
            " failed: that is a success of the defence, but nothing a table can count.\n",
            _table(adaptive, True),
        ]
    for name, run in (others or {}).items():
        title, words = OTHERS[name]
        said += [f"\n## {title}\n", words, _table(run, False)]
    return "\n".join(said).rstrip() + "\n"


def _table(run: StoredRun, hiding: bool) -> str:
    """A line per attack."""
    found = {part.level: part for part in parts(run) if part.kind == "vlm"}
    attacks = _attacks(found, hiding)
    labels = Counter(condition.label for condition in attacks)
    lines = head(" | ".join(["attack", *(claim.title for claim in CLAIMS), "caught by"]))
    for condition in attacks:
        models, name = condition.models, condition.label
        if labels[name] > 1:
            name = f"{name}, {condition.group}"
        if not condition.passed:
            why = models[0].why or "attack failed"
            lines.append(row([name, *["-"] * len(CLAIMS), why]))
            continue
        shares = [_share(found.get(claim.level), condition, claim) for claim in CLAIMS]
        told = [_told(each) for each in shares]
        lines.append(row([name, *told, _verdict(shares)]))
    return "\n".join(lines) + "\n"


def _attacks(found: dict[str, Part], hiding: bool) -> list[Condition]:
    """Conditions of sets, those that hide or those that do not."""
    some = found.get("data") or found.get("input")
    every = some.attacked if some else ()
    return [c for c in every if any(model.adaptive for model in c.models) == hiding]


def _share(part: Part | None, condition: Condition, claim: Claim) -> Estimate | None:
    """What is caught, as a share; of ASRs the share of successes that are prevented."""
    if part is None:
        return None
    place = condition
    if part.level == "model":  # there a condition is a label, whatever the set
        same = [c for c in part.conditions if (c.base, c.label) == (place.base, place.label)]
        if not same:
            return None
        place = same[0]
    after = part.of(place, claim.defence, claim.metric)
    if after is None or claim.before is None:
        return after
    before = part.of(place, claim.defence, claim.before)
    if before is None or not before.value:
        return None
    left = np.minimum(after.draws / np.maximum(before.draws, 1e-9), 1.0)
    return Estimate(1 - min(1.0, after.value / before.value), 1 - left, after.runs, after.n)


def _told(share: Estimate | None) -> str:
    if share is None:
        return "-"
    return f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}] ({share.n:,})"


def _verdict(shares: Sequence[Estimate | None]) -> str:
    """Which of our methods catch it, and which do in part."""
    best: dict[str, float] = {}
    for claim, share in zip(CLAIMS, shares, strict=True):
        if share is not None:
            best[claim.method] = max(best.get(claim.method, 0.0), share.value)
    words = [name for name, value in best.items() if value >= GOOD]
    words += [f"{name} in part" for name, value in best.items() if HALF <= value < GOOD]
    return ", ".join(words) or "**nothing**"


def main(results: Path, out: Path) -> None:
    """Write the page."""
    runs = {
        name: read_run(results / name)
        for name in ("matrix", "adaptive", *OTHERS)
        if (results / name / "suite.json").is_file()
    }
    made = page(runs.pop("matrix"), runs.pop("adaptive", None), runs)
    out.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
