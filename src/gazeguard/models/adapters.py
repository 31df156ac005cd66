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
from gazeguard.models.offload import follow, offloads, unhooked

_ADAPTER = "default"
# Settings of a LoRA adapter that only add to what a layer gives. Others read or change the layer's
# own weights, which an offloaded layer has during its pass alone.
_ADDING = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "modules_to_save",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)


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
    put in and checked like the rest. On a base model whose layers are spread over devices or
    offloaded, the adapter's weights stay where their layer computes. peft's own way would choose
    places for the layers anew, and copy those on disk.

    Args:
        model: the base model.
        folder: the adapter's folder.
        config: from `read_adapter`.
        base_name: what the user called the base model.

    Returns:
        The `peft.PeftModel`.

    Raises:
        ModelError: any tensor that is missing, left over or of the wrong shape; layers that are
            offloaded under an adapter that needs their weights.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    if offloads(model) and (special := _special(config)):
        raise ModelError(
            f"the adapter {folder} works on the weights of its layers ({', '.join(special)}), and"
            f" {base_name} is too large to keep them on the device: merge the adapter into the"
            " model and give the result, or use a larger device."
        )
    mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    try:
        with warnings.catch_warnings(), unhooked(model):
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
    _follow(adapted)
    return adapted


def _special(config: Any) -> list[str]:
    """What makes an adapter more than a sum with what its layers give."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        return [str(getattr(config.peft_type, "value", config.peft_type))]
    plain = LoraConfig()
    changed = [name for name, value in vars(plain).items() if getattr(config, name) != value]
    # Starting values are drawn, to be overwritten; those with a name of their own change the layer.
    drawn = isinstance(config.init_lora_weights, bool) or config.init_lora_weights == "gaussian"
    harmless = _ADDING | {"init_lora_weights"} if drawn else _ADDING
    return sorted(set(changed) - harmless)


def _follow(adapted: Any) -> None:
    """Have the parts of an adapter get their inputs where the layers beside them compute."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for module in list(adapted.modules()):
        if isinstance(module, BaseTunerLayer):
            follow(module, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            # Not the wrapper: it passes off the hook of the module inside as its own.
            follow(module.modules_to_save[_ADAPTER], module.original_module)


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
