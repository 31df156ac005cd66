"""LoRA adapters through peft, with proof that every tensor of the file landed.

peft warns and goes on when an adapter's keys do not fit; the model watched would then be the bare
base, and its verdict wrong. Here that is an error.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from gazeguard.errors import ModelError
from gazeguard.models.files import first_line, is_hub_id, pinned, tensor_names, weight_files

_ADAPTER = "default"


def read_adapter(folder: Path, base_name: str, base_folder: Path) -> Any:
    """Read an adapter's config and refuse what can be refused before the model is loaded.

    Args:
        folder: the adapter's folder.
        base_name: what the user called the base model.
        base_folder: the base model's folder.

    Returns:
        The `peft.PeftConfig`.

    Raises:
        ModelError: no adapter there, no LoRA, or an adapter of another base.
    """
    from peft import PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} has no adapter_config.json: give a folder written by a peft model's"
            " save_pretrained()."
        )
    _tensor_names(folder)
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(
            f"{folder}/adapter_config.json cannot be used ({first_line(error)}): copy the adapter"
            " again."
        ) from error
    if config.peft_type is None or config.is_prompt_learning:
        raise ModelError(
            f"{folder}/adapter_config.json does not describe weights that are added to a model:"
            " give a LoRA adapter."
        )
    _check_base(config.base_model_name_or_path, base_name, base_folder, folder)
    return config


def attach(model: Any, folder: Path, config: Any, base_name: str) -> Any:
    """Put an adapter on its loaded base model, unmerged and frozen.

    Fully tuned modules that the adapter saves along (`modules_to_save`, such as a projector) are
    put in and checked like the rest.

    Args:
        model: the base model.
        folder: the adapter's folder.
        config: from `read_adapter`.
        base_name: what the user called the base model.

    Returns:
        The `peft.PeftModel`.

    Raises:
        ModelError: any tensor that is missing, left over or of the wrong shape.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the checks below are stricter than peft's warnings
            adapted = PeftModel.from_pretrained(model, folder, adapter_name=_ADAPTER, config=config)
            # A second time, because the first does not hand out its report.
            weights = load_peft_weights(str(folder), device="cpu", key_mapping=mapping)
            report = set_peft_model_state_dict(adapted, weights, adapter_name=_ADAPTER)
            owned = get_peft_model_state_dict(
                adapted, adapter_name=_ADAPTER, save_embedding_layers=False
            )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the adapter {folder} does not fit {base_name} ({first_line(error)}): use the base"
            " model it was trained on."
        ) from error
    missing = [key for key in report.missing_keys if f".{_ADAPTER}" in key]
    foreign = list(report.unexpected_keys)
    stored = _tensor_names(folder)
    # A tensor of the base model's own is not "unexpected" to peft; the count gives it away.
    if not missing and not foreign and len(stored) != len(owned):
        missing = sorted(set(owned) - set(stored))
        foreign = sorted(set(stored) - set(owned))
    if missing or foreign or not owned:
        raise ModelError(_misfit(folder, base_name, missing, foreign))
    return adapted


def _misfit(folder: Path, base_name: str, missing: list[str], foreign: list[str]) -> str:
    faults = []
    if missing:
        faults.append(f"lacks {len(missing)} tensors, first '{missing[0]}'")
    if foreign:
        faults.append(f"has {len(foreign)} tensors without a place, first '{foreign[0]}'")
    what = " and ".join(faults) or "holds no tensors"
    return (
        f"the adapter {folder} {what} on {base_name}: use the base model it was trained on, or"
        " save the adapter again."
    )


def _tensor_names(folder: Path) -> list[str]:
    return [name for file in weight_files(folder) for name in tensor_names(file)]


def _check_base(recorded: str | None, given: str, folder: Path, adapter: Path) -> None:
    """Refuse an adapter that names a base which is provably another one."""
    if not recorded:
        return
    theirs = Path(recorded).expanduser()
    given, _ = pinned(given)
    differs = False
    if theirs.is_dir():
        differs = theirs.resolve() != folder and _hashes(theirs) != _hashes(folder)
    elif "/" in recorded and is_hub_id(recorded) and is_hub_id(given) and not Path(given).is_dir():
        differs = recorded.lower() != given.lower()
    if differs:
        raise ModelError(
            f"the adapter {adapter} was trained on {recorded}, not on {given}: load it on"
            f" {recorded}."
        )


def _hashes(folder: Path) -> list[str]:
    from gazeguard.models.fingerprint import sha256

    try:
        return [sha256(file) for file in weight_files(folder)]
    except ModelError:  # no longer a model: nothing to compare with
        return []
