"""What a large job costs on paper: arithmetic from the config, the rest from measurements.

python -m gazeguard.bench.scale.plan bench/results/scale.json docs/scale.md
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as hf

from gazeguard.bench.markdown import figures, head, row
from gazeguard.bench.scale.cost import arithmetic
from gazeguard.bench.scale.memory import RATE
from gazeguard.cleaning.measure import SIGNALS

ROWS = (10**6, 10**8)
TOKENS = 640  # 576 of the picture, 64 of the prompt
LOOKS = 2  # under the tuned model, and without its adapter
_TEXT_BYTES = 300  # of a row: its id, prompt and answer


@dataclass(frozen=True, slots=True)
class Assumed:
    """What nothing here was measured on.

    Attributes:
        peak: FLOP/s of a GPU in bfloat16 without sparsity, as its maker says (H100 SXM).
        shares: of the peak that a prefill in batches reaches; 0.4 is usual for models of 7B.
        gpu_hour: money for one.
        terabyte_month: money for so much in an object store.
    """

    peak: float = 989e12
    shares: tuple[float, ...] = (0.2, 0.4, 0.6)
    gpu_hour: float = 3.0
    terabyte_month: float = 23.0


def row_bytes(layers: int, heads: int) -> int:
    """Bytes of one measured row before compression: every signal, before and after."""
    per_look = sum(layers * (heads if name.startswith("head_") else 1) for name in SIGNALS)
    return 4 * LOOKS * per_look + _TEXT_BYTES


def filled(page: str, measured: dict[str, Any], assumed: Assumed | None = None) -> str:
    """`docs/scale.md` with its two tables brought up to date; the words around them stay.

    Args:
        page: the document, with the marks that begin and end the tables.
        measured: what `python -m gazeguard.bench.scale` wrote.
        assumed: about hardware and money.
    """
    parts = {
        "measured": figures(measured, "scale").rstrip(),
        "plan": plan(measured, assumed or Assumed()),
    }
    for name, text in parts.items():
        marks = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        page, found = re.subn(
            f"{re.escape(marks[0])}.*?{re.escape(marks[1])}",
            lambda _, t=text, m=marks: f"{m[0]}\n{t}\n\n{m[1]}",  # type: ignore[misc]
            page,
            flags=re.S,
        )
        if found != 1:
            raise ValueError(f"the page has no place for '{name}'")
    return page


def plan(measured: dict[str, Any], assumed: Assumed) -> str:
    """Hours, money and storage for `ROWS`, as Markdown."""
    config = hf.LlavaConfig()  # its defaults are LLaVA-1.5 with a language model of 7B
    text = config.text_config
    one = arithmetic(config, TOKENS).of(LOOKS)
    size = row_bytes(text.num_hidden_layers, text.num_attention_heads)
    (driver,) = (f["value"]["median"] for f in measured["figures"] if f["name"].endswith(RATE))
    speed = {share: share * assumed.peak / one for share in assumed.shares}
    usual = speed[sorted(speed)[len(speed) // 2]]
    lines = [
        f"One row of LLaVA-1.5-7B ({TOKENS} positions, {LOOKS} looks, the picture encoded once):"
        f" {one / 1e12:.1f} TFLOP, {size / 1e3:.1f} kB of numbers.",
        "",
        *head(
            "rows | share of a GPU's peak | rows/s a GPU | GPU hours | money | hours on 8 GPUs |"
            " on 256"
        ),
    ]
    for rows in ROWS:
        for share, rate in speed.items():
            hours = rows / rate / 3600
            cells = [f"{rows:,}", f"{share:.0%}", f"{rate:.0f}", f"{hours:,.0f}"]
            cells += [f"${hours * assumed.gpu_hour:,.0f}"]
            lines.append(row([*cells, f"{hours / 8:,.1f}", f"{hours / 256:,.1f}"]))
    lines += [
        "",
        *head(
            "rows | numbers | a month in an object store | blocks of 64 rows | hours of one"
            " driver | GPUs that one driver serves"
        ),
    ]
    for rows in ROWS:
        stored = rows * size / 1e12
        cells = [f"{rows:,}", f"{stored:,.2f} TB", f"${stored * assumed.terabyte_month:,.0f}"]
        cells += [f"{-(-rows // 64):,}", f"{rows / driver / 3600:,.1f}", f"{driver / usual:,.0f}"]
        lines.append(row(cells))
    return "\n".join(lines)


def main(results: Path, page: Path) -> None:
    """Bring the page up to date."""
    measured = json.loads(results.read_text("utf-8"))
    page.write_text(filled(page.read_text("utf-8"), measured), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
