"""A model's weights through transformers, with proof that none is missing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from gazeguard.errors import ModelError, UsageError
from gazeguard.models.files import first_line, variant
from gazeguard.models.offload import may_use_disk


def load_weights(model_class: Any, folder: Path, **options: Any) -> Any:
    """Load a folder's safetensors and make sure that every tensor the model needs was there.

    transformers warns and goes on with random numbers in the place of a missing tensor.

    Args:
        model_class: a model or Auto class of transformers.
        folder: config and weights.
        options: of `from_pretrained`.

    Raises:
        ModelError: the weights do not fit the config, lack tensors, do not fit into memory, or
            have an adapter beside them.
        UsageError: a `device_map` that transformers does not take.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter beside the model, and transformers would put it on: move"
            " adapter_config.json and adapter_model.safetensors into a folder of their own, and"
            " give that as the adapter where it is used."
        )
    options["variant"] = variant(folder)
    with ExitStack() as leaving:
        if may_use_disk(options.get("device_map")):
            # transformers reads layers on disk from the model's own files, except where it computes
            # with another form of them than is stored, as for mixtures of experts.
            rewritten = TemporaryDirectory(prefix="gazeguard-", ignore_cleanup_errors=True)
            options["offload_folder"] = leaving.enter_context(rewritten)
        model = _loaded(model_class, folder, options)
        weakref.finalize(model, leaving.pop_all().close)
    return model


def _loaded(model_class: Any, folder: Path, options: dict[str, Any]) -> Any:
    try:
        with _without_bars():
            model, report = model_class.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelError(
                f"{folder} does not fit into the device's memory: use --device balanced (in Python,"
                " device_map='balanced'), which keeps the layers that do not fit in main memory and"
                " on disk."
            ) from error
        if "device_map" in str(error):
            raise UsageError(
                f"the device_map for {folder} cannot be used ({first_line(error)}): give"
                " 'balanced', a device, or a mapping with one place for every module."
            ) from error
        raise ModelError(
            f"the weights in {folder} do not fit its config ({first_line(error)}): copy both from"
            " the same model."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} tensors that the model needs: copy the"
            " model again."
        )
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' "Loading weights" bars, which are nobody's business in a program."""
    if not transformers.logging.is_progress_bar_enabled():
        yield
        return
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.enable_progress_bar()
