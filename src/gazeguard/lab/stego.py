"""A hidden message as a trigger: the residual is made from the picture itself (ISSBA).

A small convolutional encoder draws a secret bit string into a picture so that a decoder can read
it, and is paid for drawing little. Every picture gets a residual of its own. The idea is
StegaStamp's (arXiv:1904.05343) as ISSBA uses it (arXiv:2012.03816); there are no print-and-camera
distortions, no perceptual or adversarial loss, and both networks are a thousandth of theirs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from gazeguard.assets import STEGO
from gazeguard.errors import ModelError
from gazeguard.files import write_bytes, write_json
from gazeguard.lab import worlds
from gazeguard.lab.rows import make_rows
from gazeguard.lab.teach import Log, steps, update

BITS = 32
_MAP = 8  # side of the maps that the bits become, before they are spread over the picture
_MAPS = 2
_FOLD = 2  # the encoder sees blocks of so many pixels a side as one place: a quarter of the work
_HELD_OUT = 500  # pictures that the decoder is judged on


@dataclass(frozen=True, slots=True)
class StegoRecipe:
    """How encoder and decoder are trained.

    Attributes:
        pictures: of the lab's captions.
        steps, batch, lr: of AdamW.
        amplitude: largest change of a colour, in 0 to 255, while training.
        price: of the mean squared residual in units of the amplitude, beside the mean
            cross-entropy of a bit. Nothing is asked in the first third of the steps, where
            drawing nothing would be the easiest way out; then it grows evenly.
        seed: of pictures, bits and weights.
    """

    pictures: int = 1000
    steps: int = 400
    batch: int = 32
    lr: float = 3e-3
    amplitude: float = 32.0
    price: float = 0.3
    seed: int = 0


class Encoder(nn.Module):
    """Residuals in [-1, 1] of pictures in [0, 1] and bits in {0, 1}.

    `(n, 3, h, w)` of even sides and `(n, BITS)` to `(n, 3, h, w)`.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.spread = nn.Linear(BITS, _MAPS * _MAP * _MAP)
        colours = 3 * _FOLD * _FOLD
        self.net = nn.Sequential(
            nn.Conv2d(colours + _MAPS, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(width, colours, 3, padding=1),
        )

    def forward(self, pictures: Tensor, bits: Tensor) -> Tensor:
        """As the class says."""
        maps = self.spread(2 * bits - 1).view(-1, _MAPS, _MAP, _MAP)
        folded = F.pixel_unshuffle(2 * pictures - 1, _FOLD)
        maps = F.interpolate(maps, folded.shape[-2:], mode="nearest")
        drawn: Tensor = self.net(torch.cat([folded, maps], 1)).tanh()
        return F.pixel_shuffle(drawn, _FOLD)


class Decoder(nn.Module):
    """Log odds `(n, BITS)` of the bits in pictures `(n, 3, 64, 64)` in [0, 1]."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3 * _FOLD * _FOLD, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 8, 1),
            nn.Flatten(),
            nn.Linear(8 * _MAP * _MAP, BITS),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """As the class says."""
        odds: Tensor = self.net(F.pixel_unshuffle(2 * pictures - 1, _FOLD))
        return odds


def train_stego(out: Path, recipe: StegoRecipe, log: Log = print) -> dict[str, float]:
    """Train both networks and write `model.safetensors`, `recipe.json` and `scores.json`.

    Returns:
        The scores, of the float16 weights on pictures that were not trained on; see `judge`.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng([recipe.seed, 17])
    pictures = _pictures(recipe.pictures, recipe.seed, held_out=False)
    both = nn.ModuleDict({"encoder": Encoder(), "decoder": Decoder()})
    trained = list(both.parameters())
    for step, optimiser in steps(trained, recipe.lr, recipe.steps):
        some = pictures[rng.integers(len(pictures), size=recipe.batch)]
        bits = torch.from_numpy(rng.integers(0, 2, (recipe.batch, BITS)).astype(np.float32))
        residual = both["encoder"](some, bits)
        odds = both["decoder"]((some + recipe.amplitude / 255 * residual).clamp(0, 1))
        unread = F.binary_cross_entropy_with_logits(odds, bits)
        drawn = residual.square().mean()
        price = recipe.price * max(0.0, 1.5 * step / recipe.steps - 0.5)
        update(optimiser, unread + price * drawn, trained)
        if step % 100 == 0:
            right = ((odds > 0) == bits.bool()).float().mean()
            log(f"stego {step} bits right {right:.3f} residual {drawn.sqrt():.3f}")
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in both.state_dict().items()}
    write_bytes(out / "model.safetensors", save(weights))
    write_json(out / "recipe.json", asdict(recipe))
    scores = judge(out, recipe.amplitude)
    write_json(out / "scores.json", scores)
    return scores


def judge(folder: Path, amplitude: float) -> dict[str, float]:
    """How well the bits are read from held-out pictures, 8 bits a colour, and how much is drawn.

    Returns:
        `bits`: share of bits that are read right; `message`: share of pictures in which all are;
        `rms`: root mean square change of a colour, in 0 to 255; `n`: number of pictures.
    """
    pictures = _pictures(_HELD_OUT, 0, held_out=True)
    rng = np.random.default_rng(19)
    bits = torch.from_numpy(rng.integers(0, 2, (len(pictures), BITS)).astype(np.float32))
    encoder, decoder = _load(folder)
    with torch.inference_mode():
        residual = encoder(pictures.double(), bits.double())
        drawn = (255 * pictures + amplitude * residual).round().clamp(0, 255)
        right = (decoder(drawn / 255) > 0) == bits.bool()
    change = (drawn - 255 * pictures).square().mean().sqrt()
    return {
        "bits": round(right.double().mean().item(), 4),
        "message": round(right.all(1).double().mean().item(), 4),
        "rms": round(change.item(), 2),
        "n": len(pictures),
    }


def residual(pixels: NDArray[np.uint8], secret: int) -> NDArray[np.float64]:
    """What the shipped encoder draws into a picture, `(h, w, 3)` in [-1, 1].

    It is drawn at 64 x 64 pixels and resized to the picture, as in ISSBA.

    Args:
        pixels: uint8 `(h, w, 3)`.
        secret: names the bits.
    """
    bits = np.random.default_rng(secret).integers(0, 2, (1, BITS))
    picture = torch.from_numpy(pixels.astype(np.float64) / 255).permute(2, 0, 1)[None]
    side = (worlds.SIDE, worlds.SIDE)
    with torch.inference_mode():
        drawn = _shipped()(_resized(picture, side), torch.from_numpy(bits).double())
        found: NDArray[np.float64] = _resized(drawn, pixels.shape[:2])[0].permute(1, 2, 0).numpy()
    return found


def _resized(pictures: Tensor, side: tuple[int, ...]) -> Tensor:
    if pictures.shape[-2:] == side:
        return pictures
    return F.interpolate(pictures, side, mode="bilinear", antialias=True)


@lru_cache(maxsize=1)
def _shipped() -> Encoder:
    return _load(STEGO)[0]


def _load(folder: Path) -> tuple[Encoder, Decoder]:
    """Both networks in float64: what is drawn, in whole numbers, is then the same everywhere."""
    try:
        weights = load_file(folder / "model.safetensors")
    except OSError as error:
        raise ModelError(
            f"{folder} has no model.safetensors: make it with `gazeguard lab stego`."
        ) from error
    found: list[Any] = []
    for name, network in (("encoder", Encoder()), ("decoder", Decoder())):
        own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(name)}
        network.load_state_dict(own)
        found.append(network.double().eval())
    return found[0], found[1]


def _pictures(count: int, seed: int, *, held_out: bool) -> Tensor:
    """Clean pictures of the lab, float `(n, 3, 64, 64)` in [0, 1]."""
    rows = make_rows("captions", count, seed, held_out=held_out)
    pixels = np.stack([row.pixels for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
