"""The names of stored tensors, brought to those of a loaded model.

Files outlive the layouts of the models they were made for: transformers moved LLaVA's language
model in 4.52, the LLaVA repository has names of its own, and some trainers save an adapter's name
along or leave peft's prefix out. transformers' own tables say what moved where.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gazeguard.errors import ModelError

_PREFIX = "base_model.model."
# `lora_A.NAME.weight`, `lora_embedding_A.NAME`, `modules_to_save.NAME.weight`
_NAMED = re.compile(r"\.(lora_\w+)\.(?!weight$|bias$)([^.]+)(?=\.weight$|\.bias$|$)")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)\.")
# Of the LLaVA repository, where the language model holds the rest.
_LLAVA = (
    (re.compile(r"^(?:model\.)?mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"^(?:model\.)?mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"^model\.(layers|embed_tokens|norm)\."), r"model.language_model.\1."),
)
_PROJECTOR = ("mm_projector", "multi_modal_projector")
_TEXT_CLASSES = re.compile(r"(CLIP|Clip|Siglip)\w*Text\w*|CLIPModel|SiglipModel|ChineseCLIPModel")
_TEXT_NAMES = re.compile(r"^(base_model\.model\.)?(text_model\.|text_encoder(_\d)?\.|lora_te)")


def for_text_encoder(folder: Path, names: Iterable[str]) -> bool:
    """Whether an adapter belongs on a text encoder, by its tensors or the class that it names."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        mapping = config.get("auto_mapping") or {}
        named = str(mapping.get("base_model_class", ""))
    except (OSError, ValueError, AttributeError):  # reading it says so
        return False
    names = list(names)
    by_name = bool(names) and all(_TEXT_NAMES.match(name) for name in names)
    return by_name or bool(_TEXT_CLASSES.fullmatch(named))


class Layout:
    """Where the parts of a loaded model are.

    Args:
        model: of transformers, without an adapter.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self._modules = {name for name, _ in model.named_modules()}
        self._tensors = set(model.state_dict())
        moves = get_model_conversion_mapping(model, add_legacy=False)
        self._moves = [move for move in moves if isinstance(move, WeightRenaming)]

    def plain(self, weights: Mapping[str, Any], config: Any, folder: Path) -> dict[str, Any]:
        """An adapter's tensors under peft's names for this model.

        `config` is brought along: names of modules that moved are replaced by where they are now.

        Args:
            weights: as stored.
            config: of peft.
            folder: of the adapter, for errors.

        Raises:
            ModelError: more than one adapter in one file.
        """
        bare = {_unnamed(key.removeprefix(_PREFIX)): value for key, value in weights.items()}
        names = {name for key in weights for name in _names(key)}
        if len(names) > 1 or len(bare) != len(weights):
            raise ModelError(
                f"{folder} holds several adapters in one file ({', '.join(sorted(names))}): save"
                " each in a folder of its own."
            )
        placed = {key: self._place(key) for key in bare}
        if any(key != place for key, place in placed.items()):
            self._follow(config, placed)
        return {_PREFIX + placed[key]: value for key, value in bare.items()}

    def moved(self, key: str) -> str:
        """A tensor's name in the model, from that in a file of any age."""
        from transformers.core_model_loading import rename_source_key

        return key if self._has(key) else rename_source_key(key, self._moves, [])[0]

    def _place(self, key: str) -> str:
        """Where an adapter's tensor belongs now; itself where no table knows."""
        moved = [key, self.moved(key)]
        moved += [pattern.sub(to, key) for pattern, to in _LLAVA]
        return next((place for place in moved if self._has(place)), key)

    def _has(self, key: str) -> bool:
        module, lora, _ = key.partition(".lora_")
        return module in self._modules if lora else key in self._tensors

    def _follow(self, config: Any, placed: Mapping[str, str]) -> None:
        """Let a config find the modules whose tensors moved."""
        from peft.tuners.tuners_utils import check_target_module_exists

        mine = {place.partition(".lora_")[0] for place in placed.values() if ".lora_" in place}
        asked = {name for name in self._modules if check_target_module_exists(config, name)}
        foreign = any(pattern.match(key) for key in placed for pattern, _ in _LLAVA)
        # In the LLaVA repository the vision part is none of the model's, so it was never asked for.
        if mine and (foreign or not mine <= asked):
            config.target_modules = sorted(mine)
        saved = getattr(config, "modules_to_save", None)
        if saved:
            config.modules_to_save = [
                _PROJECTOR[1]
                if name.rpartition(".")[2] == _PROJECTOR[0]
                else name.rpartition(".")[2]
                for name in saved
            ]


def _names(key: str) -> list[str]:
    """The adapter that a stored name belongs to, where it says so."""
    return [*(match[2] for match in _NAMED.finditer(key)), *_SAVED.findall(key)]


def _unnamed(key: str) -> str:
    return _SAVED.sub(".", _NAMED.sub(r".\1", key))
