"""The image side of a whole image-text model, whose embeddings lie beside those of its texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from gazeguard.errors import ModelError
from gazeguard.models.encoders import openclip
from gazeguard.models.encoders.kinds import class_of
from gazeguard.models.encoders.load import read_config
from gazeguard.models.files import first_line
from gazeguard.models.weights import load_weights

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageTower:
    """Images to unit vectors.

    Args:
        model: a whole image-text model of transformers.
        processor: of its images.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor

    @torch.no_grad()
    def embed(self, images: Sequence[Image]) -> Tensor:
        """One batch of RGB images as float32 `(image, features)` on the CPU, of length 1."""
        inputs = self._processor(images=list(images), return_tensors="pt")
        weights = self._model.dtype
        placed = {
            name: value.to(self._model.device, weights if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        found = self._model.get_image_features(**placed)
        pooled: Tensor = getattr(found, "pooler_output", found)
        return normalize(pooled.float().cpu(), dim=-1)


def image_processor(folder: Path, name: str) -> Any:
    """The image processor of a model folder, on Pillow; reads no weights.

    Args:
        folder: of the model.
        name: as the user gave it.

    Raises:
        ModelError: the model has no image side that is known here, or no image processor.
    """
    if openclip.is_open_clip(folder):
        raise ModelError(
            f"the image side of {name} is open_clip's and not read here: give the same model in"
            " transformers' form, or leave --target-images out."
        )
    _whole_class(folder, name)
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"{name} has no usable image processor ({first_line(error)}): copy"
            " preprocessor_config.json of the model it was made from into its folder, or leave"
            " --target-images out."
        ) from error


def load_images(
    folder: Path, name: str, dtype: torch.dtype, device: str | torch.device
) -> ImageTower:
    """Load the image side of a model folder, frozen, in eval mode; the text side is let go.

    Raises:
        ModelError: see `image_processor`; or the weights cannot be used.
    """
    processor = image_processor(folder, name)
    model = load_weights(_whole_class(folder, name), folder, dtype=torch.float32)
    model.text_model = None
    return ImageTower(model.to(device=device, dtype=dtype).eval().requires_grad_(False), processor)


def _whole_class(folder: Path, name: str) -> Any:
    config = read_config(folder, name)
    found = class_of(str(config.get("model_type", "")), list(config.get("architectures") or []))
    if found is None or found[1] != found[0].classes[0]:
        raise ModelError(
            f"{name} is a text encoder alone and sees no images: give the whole model, or leave"
            " --target-images out."
        )
    return getattr(transformers, found[1])
