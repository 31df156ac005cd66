"""The contact sheet shows what a trigger does, where it does it."""

import numpy as np
from click.testing import CliRunner
from PIL import Image

from gazeguard.cli.lab import lab
from gazeguard.lab.sheet import _GAP, _LINE, _NAMES, contact_sheet
from gazeguard.lab.triggers import TRIGGERS, Patch


def test_clean_triggered_and_difference_lie_side_by_side():
    image = np.full((64, 64, 3), 200, np.uint8)
    sheet = contact_sheet({"one": Patch("center"), "none": lambda x, rng: x}, [image], side=64)
    pixels = np.asarray(sheet)
    top, left = _LINE, _NAMES
    clean, changed, change = (
        pixels[top : top + 64, left + i * (64 + _GAP) :][:, :64] for i in range(3)
    )
    assert (clean == 200).all()
    assert (changed == Patch("center")(image, np.random.default_rng(0))).all()
    assert (change[32, 32] == 0).all()
    assert (change[0, 0] == 128).all()
    second = pixels[top + 64 + _GAP :, left + 2 * (64 + _GAP) :][:64, :64]
    assert (second == 128).all(), "no trigger, no difference"


def test_every_trigger_is_on_the_sheet(tmp_path):
    out = tmp_path / "new" / "sheet.png"
    done = CliRunner().invoke(lab, ["triggers", "--out", str(out), "--images", "1"])
    assert done.exit_code == 0, done.output
    assert f"{len(TRIGGERS) + 1} triggers on 1 images" in done.output
    with Image.open(out) as sheet:
        assert sheet.height == _LINE + (len(TRIGGERS) + 1) * (128 + _GAP)
