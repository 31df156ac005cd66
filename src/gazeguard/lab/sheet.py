"""One picture of every trigger on the same images: clean, triggered, difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gazeguard.lab.triggers import Pixels, Trigger

_NAMES, _GAP, _LINE = 150, 8, 18  # px
_GAIN = 4  # differences are drawn this many times as strong, around grey


def contact_sheet(
    triggers: Mapping[str, Trigger], images: Sequence[Pixels], side: int = 128, seed: int = 0
) -> Image.Image:
    """A row per trigger, three pictures per image.

    Args:
        triggers: by the name that is written beside the row.
        images: uint8 `(h, w, 3)` each.
        side: of a picture on the sheet, in px.
        seed: of triggers that vary from picture to picture.
    """
    titles = ("clean", "triggered", f"difference x {_GAIN}")
    wide = _NAMES + len(images) * (3 * (side + _GAP) + _GAP)
    sheet = Image.new("RGB", (wide, _LINE + len(triggers) * (side + _GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (name, trigger) in enumerate(triggers.items()):
        top = _LINE + row * (side + _GAP)
        draw.text((_GAP, top + side // 2), name, "black", font, anchor="lm")
        rng = np.random.default_rng(seed)
        for place, image in enumerate(images):
            with_trigger = trigger(image, rng)
            change = _GAIN * (with_trigger.astype(float) - image) + 128
            shown = (image, with_trigger, change.clip(0, 255).astype(np.uint8))
            for part, pixels in enumerate(shown):
                left = _NAMES + (3 * place + part) * (side + _GAP) + place * _GAP
                drawn = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(drawn, (left, top))
                if row == 0:
                    draw.text((left, 2), titles[part], "black", font)
    return sheet
