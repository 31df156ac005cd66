"""What a name means for EntropyScan: a whole model, or an adapter on a base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gazeguard.errors import ModelError
from gazeguard.models.difference import Difference, adapter_difference, compare
from gazeguard.models.files import resolve, weight_files
from gazeguard.models.fingerprint import sha256
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.scanning.models import is_adapter
from gazeguard.scanning.store import folder_hashes


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to look at.

    Attributes:
        name: as the user gave it.
        folder: of the whole model; for an adapter, of its base.
        adapter: folder of the adapter, or None.
    """

    name: str
    folder: Path
    adapter: Path | None = None

    @classmethod
    def of(cls, name: str, base: Path) -> Subject:
        """What a name means beside a base.

        Raises:
            ModelError: there is no such model.
        """
        folder = resolve(name)
        return cls(name, base, folder) if is_adapter(folder) else cls(name, folder)

    @property
    def hashes(self) -> dict[str, str]:
        """File name -> SHA-256 of all that the subject is made of; a base under its weights."""
        if self.adapter is None:
            return folder_hashes(self.folder)
        files = [*weight_files(self.adapter), self.adapter / "adapter_config.json"]
        base = {f"base/{name}": value for name, value in folder_hashes(self.folder).items()}
        return base | {file.name: sha256(file) for file in files}

    def difference(self, base: Path) -> Difference:
        """What it differs in from the base.

        Raises:
            ModelError: it cannot have been made from it.
        """
        if self.adapter is not None:
            return adapter_difference(self.adapter, self.folder)
        return compare(self.folder, base, self.name)

    def load(self, dtype: str, device_map: str) -> Target:
        """The model, in eval mode.

        Raises:
            ModelError: it cannot be used.
        """
        # The base by its folder: it was named by the user, who may call it by another name.
        return load(self.folder, self.adapter, None, dtype, device_map)


def recorded_base(adapter: Path) -> str | None:
    """The base that an adapter names, where that is a folder or could be a hub id."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        name = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{adapter}/adapter_config.json cannot be read: copy the adapter again."
        ) from error
    usable = isinstance(name, str) and (Path(name).is_dir() or name.count("/") == 1)
    return name if usable else None
