"""What a name means for EntropyScan: a whole model, or an adapter on a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gazeguard.models.adapters import base_note, recorded_name
from gazeguard.models.difference import Difference, adapter_difference, compare
from gazeguard.models.files import adapter_files, is_adapter, resolve, weight_files
from gazeguard.models.fingerprint import sha256
from gazeguard.models.load import load
from gazeguard.models.target import Target
from gazeguard.models.unread import Unread, unread
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
        files = [*adapter_files(self.adapter), self.adapter / "adapter_config.json"]
        base = {f"base/{name}": value for name, value in folder_hashes(self.folder).items()}
        return base | {file.name: sha256(file) for file in files}

    @property
    def unread(self) -> tuple[Unread, ...]:
        """Weights in its own folder that were not looked at."""
        if self.adapter is None:
            return unread(self.folder, weight_files(self.folder))
        return unread(self.adapter, adapter_files(self.adapter))

    @property
    def note(self) -> str | None:
        """What is to be known about the base that an adapter names.

        Raises:
            ModelError: it is another one.
        """
        if self.adapter is None:
            return None
        return base_note(self.adapter, str(self.folder), self.folder)

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
    """The base that an adapter names, where that is a folder or could be a hub id.

    Raises:
        ModelError: its settings cannot be read.
    """
    name = recorded_name(adapter)
    return name if name and (Path(name).is_dir() or name.count("/") == 1) else None
