"""LoRA adapters through peft, with proof that every tensor of the file landed.

peft warns and goes on when an adapter's keys do not fit; the model watched would then be the bare
base, and its verdict wrong. Here that is an error.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from gazeguard.errors import MeasurementError, ModelError
from gazeguard.models.difference import in_words
from gazeguard.models.files import (
    adapter_files,
    first_line,
    is_hub_id,
    pinned,
    tensor_names,
    weight_files,
)
from gazeguard.models.layout import Layout, for_text_encoder
from gazeguard.models.offload import follow, offloads, unhooked
from gazeguard.models.unread import same_weights

log = logging.getLogger(__name__)

_ADAPTER = "default"
TEXT_ENCODER = (
    "{0} is a LoRA adapter for a text encoder, which is judged as a whole: put it in with"
    " PeftModel.from_pretrained(encoder, '{0}').merge_and_unload().save_pretrained('merged'), and"
    " run gazeguard scan merged --anchor ENCODER."
)
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
        inside = sorted(file.parent for file in folder.glob("*/adapter_config.json"))
        instead = inside[-1] if inside else "a folder written by a peft model's save_pretrained()"
        raise ModelError(f"{folder} has no adapter_config.json: give {instead}.")
    (file,) = adapter_files(folder)
    if for_text_encoder(folder, tensor_names(file)):
        raise ModelError(TEXT_ENCODER.format(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # settings of a newer peft
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
    if note := base_note(folder, base_name, base_folder):
        log.warning("%s", note)
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
        MeasurementError: the adapter changes nothing.
    """
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
    )
    from safetensors.torch import load_file

    if offloads(model) and (special := _special(config)):
        raise ModelError(
            f"the adapter {folder} works on the weights of its layers ({', '.join(special)}), and"
            f" {base_name} is too large to keep them on the device: merge the adapter into the"
            " model and give the result, or use a larger device."
        )
    (file,) = adapter_files(folder)
    trained_on = config.base_model_name_or_path
    cure = "save or copy the adapter again"
    if trained_on and not same_base(trained_on, base_name):
        cure = f"use the base model it was trained on, which it calls {trained_on}"
    weights = Layout(model).plain(load_file(file), config, folder)
    try:
        with warnings.catch_warnings(), unhooked(model):
            warnings.simplefilter("ignore")  # the checks below are stricter than peft's warnings
            adapted = get_peft_model(model, config, adapter_name=_ADAPTER)
            weights = convert_peft_adapter_state_dict_for_transformers(
                adapted, config, weights, _ADAPTER
            )
            owned = get_peft_model_state_dict(
                adapted, adapter_name=_ADAPTER, save_embedding_layers=False
            )
            if fault := _misfit(weights, owned, cure):
                raise ModelError(f"the adapter {folder} does not fit {base_name}: {fault}.")
            report = set_peft_model_state_dict(adapted, weights, adapter_name=_ADAPTER)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the adapter {folder} does not fit {base_name} ({first_line(error)}): {cure}."
        ) from error
    if report.unexpected_keys or any(f".{_ADAPTER}" in key for key in report.missing_keys):
        raise ModelError(f"peft could not put all of the adapter {folder} on {base_name}: {cure}.")
    if _idle(weights, adapted, config):
        raise MeasurementError(
            f"the adapter {folder} changes nothing on {base_name} (all its B matrices are zero), so"
            " there is nothing to judge: give it as it was saved after training."
        )
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


def _misfit(weights: dict[str, Any], owned: dict[str, Any], cure: str) -> str:
    """Why tensors do not fit their places, and what to do; empty where all do."""
    if not weights:
        return "it holds no tensors; save the adapter again"
    foreign = weights.keys() - owned.keys()
    missing = owned.keys() - weights.keys()
    odd = [key for key in weights.keys() & owned.keys() if weights[key].shape != owned[key].shape]
    if odd:
        stored = {weights[key].shape[0] for key in odd if ".lora_A." in key}
        wanted = {owned[key].shape[0] for key in odd if ".lora_A." in key}
        if len(stored) == len(wanted) == 1 and stored != wanted:
            return (
                f"its tensors have rank {stored.pop()} and its adapter_config.json says"
                f" {wanted.pop()}; copy both from the same adapter"
            )
        return f"it holds {in_words(odd)} for layers of another size; {cure}"
    faults = []
    if missing:
        faults.append(f"it lacks {in_words(missing)}, of {len(owned)} that its settings ask for")
    if foreign:
        faults.append(f"it holds {in_words(foreign)} without a place there")
    elif missing:  # what is there fits
        cure = "save or copy the adapter again"
    return f"{', and '.join(faults)}; {cure}" if faults else ""


def _idle(weights: dict[str, Any], adapted: Any, config: Any) -> bool:
    """Whether a LoRA adapter leaves every layer as it was."""
    from peft import LoraConfig
    from peft.utils import ModulesToSaveWrapper

    saved = [m for m in adapted.modules() if isinstance(m, ModulesToSaveWrapper)]
    own = sum(len(wrapper.original_module.state_dict()) for wrapper in saved)
    lora = [key for key in weights if ".lora_A" in key or ".lora_embedding_A" in key]
    second = [key for key in weights if ".lora_B" in key or ".lora_embedding_B" in key]
    if not isinstance(config, LoraConfig) or len(lora) + len(second) + own != len(weights):
        return False  # something else is tuned as well
    if any(weights[key].any() for key in second):
        return False
    pairs = [
        (before, wrapper.modules_to_save[_ADAPTER].state_dict()[name])
        for wrapper in saved
        for name, before in wrapper.original_module.state_dict().items()
    ]
    return all(
        not before.is_meta and bool((before.cpu() == after.cpu()).all()) for before, after in pairs
    )


def base_note(folder: Path, base_name: str, base_folder: Path) -> str | None:
    """What is to be known about the base that an adapter names, when it is not plainly the given.

    The same weights go by many names and paths, so another name alone is no fault: shapes and
    tensors decide whether the adapter fits.

    Args:
        folder: of the adapter.
        base_name: what the user called the base.
        base_folder: of the base.

    Raises:
        ModelError: it names a base that is provably another one.
    """
    named = recorded_name(folder)
    if not named:
        return None
    theirs = Path(named).expanduser()
    given = _identity(base_name, base_folder)
    if theirs.is_dir():
        if theirs.resolve() == base_folder or _same_weights(theirs, base_folder):
            return None
        other = True
    else:
        if not _published(named) or same_base(named, given):  # a path of another machine
            return None
        other = _published(given)
    if other:
        raise ModelError(
            f"the adapter {folder} was trained on {named}, not on {given}: load it on {named}."
        )
    return (
        f"{folder} names {named} as its base; whether {base_name} is that model cannot be told"
        " from its files."
    )


def recorded_name(folder: Path) -> str | None:
    """The base that an adapter's settings name.

    Raises:
        ModelError: they cannot be read.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        named = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder}/adapter_config.json cannot be read: copy the adapter again."
        ) from error
    return named if isinstance(named, str) and named else None


def same_base(named: str, given: str) -> bool:
    """Whether two names are one: a folder, or a hub id of any organisation and its local copy."""
    if Path(named).expanduser().resolve() == Path(given).expanduser().resolve():
        return True
    return _published(named) and _model(named) == _model(given)


def _published(name: str) -> bool:
    return "/" in name and is_hub_id(pinned(name)[0]) and not Path(name).is_dir()


def _model(hub_id: str) -> str:
    return pinned(hub_id)[0].rpartition("/")[2].lower()


def _identity(name: str, folder: Path) -> str:
    """The hub id of a model, as given, from its place in the cache or its config; else its name."""
    if _published(name):
        return pinned(name)[0]
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--").replace("--", "/", 1)
    try:
        own = json.loads((folder / "config.json").read_text("utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        own = None
    return own if isinstance(own, str) and _published(own) else name


def _same_weights(theirs: Path, ours: Path) -> bool:
    """Whether two folders hold the same model; so taken where one is no longer a model."""
    try:
        files = weight_files(theirs)
    except ModelError:
        return True
    return all(same_weights(file, weight_files(ours)) for file in files)
