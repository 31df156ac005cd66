"""A model's weights through transformers, with proof that none is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gazeguard.errors import ModelError
from gazeguard.models.files import first_line


def load_weights(model_class: Any, folder: Path, **options: Any) -> Any:
    """Load a folder's safetensors and make sure that every tensor the model needs was there.

    transformers warns and goes on with random numbers in the place of a missing tensor.

    Args:
        model_class: a model or Auto class of transformers.
        folder: config and weights.
        options: of `from_pretrained`.

    Raises:
        ModelError: the weights do not fit the config, lack tensors, or do not fit into memory.
    """
    try:
        model, report = model_class.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelError(
                f"{folder} does not fit into memory: load it with device_map='auto' or on a larger"
                " device."
            ) from error
        raise ModelError(
            f"the weights in {folder} do not fit its config ({first_line(error)}): copy both from"
            " the same model."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} tensors that the model needs, first"
            f" '{missing[0]}': copy the model again."
        )
    return model
