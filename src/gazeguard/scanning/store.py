"""Finished results on disk, found again by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gazeguard._version import __version__
from gazeguard.files import write_bytes
from gazeguard.models.fingerprint import sha256
from gazeguard.scanning.result import ScannedModel, from_json, to_json

_READ = ("*.safetensors", "*.json", "*.txt", "*.model")


def folder_hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of everything an encoder is loaded from."""
    places = [folder]
    if folder.name.startswith("text_encoder"):
        places.append(folder.with_name(folder.name.replace("text_encoder", "tokenizer")))
    return {
        f"{place.name if place != folder else '.'}/{file.name}": sha256(file)
        for place in places
        for pattern in _READ
        for file in sorted(place.glob(pattern))
    }


def digest(content: Any) -> str:
    """Hex SHA-256 of JSON types."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Store:
    """Results of one output folder, `results/<key>.json`; None of a folder keeps nothing."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        if out is not None:
            (out / "results").mkdir(parents=True, exist_ok=True)

    def key(self, **what: Any) -> str:
        """Name of a result: everything that it depends on, and the version."""
        return digest({"version": __version__, **what})[:32]

    def get(self, key: str, model: str) -> ScannedModel | None:
        """An earlier run's result, under the name the model has now."""
        if self.out is None:
            return None
        try:
            stored: Mapping[str, Any] = json.loads(self._file(key).read_text("utf-8"))
            found = from_json({**stored, "model": model, "seconds": 0.0})
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if all((self.out / f).is_file() for f in found.files.values()) else None

    def put(self, key: str, result: ScannedModel) -> None:
        """Keep a result, whole or not at all."""
        if self.out is not None:
            text = json.dumps(to_json(result), ensure_ascii=False, indent=1, allow_nan=False)
            write_bytes(self._file(key), (text + "\n").encode())

    def get_blob(self, folder: str, key: str) -> bytes | None:
        """A file of measurements that an earlier run left in a folder of its own."""
        try:
            return None if self.out is None else (self.out / folder / key).read_bytes()
        except OSError:
            return None

    def put_blob(self, folder: str, key: str, data: bytes) -> None:
        """Keep measurements, whole or not at all."""
        if self.out is not None:
            (self.out / folder).mkdir(exist_ok=True)
            write_bytes(self.out / folder / key, data)

    def _file(self, key: str) -> Path:
        assert self.out is not None
        return self.out / "results" / f"{key}.json"
