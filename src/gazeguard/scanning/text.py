"""Scanning one text encoder, from its name to an entry of the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gazeguard.errors import MeasurementError, ModelError
from gazeguard.methods.amdet import EncoderScan, References, Settings, scan_encoder
from gazeguard.methods.amdet.evidence import save_recovered, save_textual_inversion
from gazeguard.models.encoders.encoder import TextEncoder
from gazeguard.models.encoders.images import image_processor
from gazeguard.models.encoders.load import encoder_folder, load_encoder, unread_weights
from gazeguard.scanning.models import TEXT_ENCODER
from gazeguard.scanning.result import Check, ScannedModel, Status
from gazeguard.scanning.store import Store, digest, folder_hashes
from gazeguard.scanning.target_images import TargetImages
from gazeguard.types import Outcome, Verdict

_BARS = 40  # of the eigenvalue histogram


@dataclass(frozen=True)
class TextScan:
    """Everything that is the same for all encoders of a list.

    Attributes:
        anchor: the clean encoder, loaded; moved to `device` by the first scan.
        prompts: ordinary prompts.
        settings: of the method.
        dtype, device: of the suspects.
        store: of finished results.
        references: benign fine-tunes, once they are scanned.
        textual_inversion: also write a file that diffusers loads.
        images: a folder's images to compare the recovered target with, or None.
    """

    anchor: TextEncoder
    prompts: Sequence[str]
    settings: Settings
    dtype: torch.dtype
    device: torch.device
    store: Store
    references: References | None = None
    textual_inversion: bool = False
    images: TargetImages | None = None

    def scan(self, model: str, progress: Callable[[int, int], None] | None) -> ScannedModel:
        """Scan one encoder, or take an earlier run's result.

        Raises:
            ModelError: it cannot be used.
        """
        folder = encoder_folder(model)
        hashes = folder_hashes(folder)
        key = self.store.key(suspect=hashes, run=self._conditions())
        found = self.store.get(key, model)
        if found is None:
            found = self._scan(model, digest(hashes), key, progress)
            self.store.put(key, found)
        return found.without(unread_weights(folder))

    def _conditions(self) -> dict[str, Any]:
        references = self.references and [*self.references.leverages, self.references.alpha]
        anchor = self.anchor.folder
        images = {} if self.images is None else {"images": digest(self.images.identities())}
        return images | {
            "anchor": None if anchor is None else folder_hashes(anchor),
            "prompts": digest(list(self.prompts)),
            "settings": self.settings.as_dict(),
            "dtype": str(self.dtype),
            "device": self.device.type,
            "references": references,
            "textual_inversion": self.textual_inversion,
        }

    def _scan(
        self,
        model: str,
        fingerprint: str,
        key: str,
        progress: Callable[[int, int], None] | None,
    ) -> ScannedModel:
        began = time.monotonic()
        if self.images is not None:  # asked for before minutes of search
            image_processor(encoder_folder(model), model)
        suspect = load_encoder(model, dtype=self.dtype, device=self.device)
        for part in (self.anchor.model, self.anchor.projection):
            if part is not None:
                part.to(self.device)
        try:
            suspect.check_finite()  # also what an anchor without a projection leaves out
            with _told_of_memory(model):
                found = scan_encoder(
                    suspect,
                    self.anchor,
                    self.prompts,
                    self.settings,
                    references=self.references,
                    progress=progress,
                )
        except MeasurementError as error:
            sentence = str(error)
            verdict = Verdict(
                Outcome.INCONCLUSIVE, None, None, "", sentence[:1].upper() + sentence[1:]
            )
            return ScannedModel(
                model,
                Status.DONE,
                TEXT_ENCODER,
                "amdet",
                verdict,
                fingerprint=fingerprint,
                seconds=time.monotonic() - began,
            )
        entry = ScannedModel(
            model,
            Status.DONE,
            TEXT_ENCODER,
            "amdet",
            found.verdict,
            checks=tuple(
                Check(
                    gate.name,
                    gate.value if np.isfinite(gate.value) else None,
                    gate.threshold,
                    gate.passed,
                    gate.meaning,
                    decides=self.settings.gates and self.references is None,
                )
                for gate in found.gates
            ),
            numbers=_numbers(found, suspect),
            figures=_figures(found),
            files=self._files(found, suspect, key),
            fingerprint=fingerprint,
        )
        if self.images is not None:
            vector = found.vectors[found.best]
            with _told_of_memory(model):
                entry = self.images.add_to(entry, suspect, vector, self.prompts)
        return replace(entry, seconds=time.monotonic() - began)

    def _files(self, found: EncoderScan, suspect: TextEncoder, key: str) -> dict[str, str]:
        """Write the recovered embeddings; paths relative to the output folder."""
        if self.store.out is None:
            return {}
        recovered = Path("recovered") / f"{key}.safetensors"
        (self.store.out / "recovered").mkdir(exist_ok=True)
        save_recovered(
            self.store.out / recovered, found.vectors, found.best, found.held.target, suspect.name
        )
        files = {"recovered trigger and target": str(recovered)}
        if self.textual_inversion:
            loadable = recovered.with_suffix(".textual-inversion.safetensors")
            save_textual_inversion(self.store.out / loadable, found.vectors[found.best])
            files["textual inversion"] = str(loadable)
        return files


@contextmanager
def _told_of_memory(model: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{model} does not fit into memory: use --restarts 1, --dtype bfloat16 or another"
            " --device."
        ) from error


def _numbers(found: EncoderScan, suspect: TextEncoder) -> dict[str, Any]:
    held = found.held
    return {
        "score": held.score,
        "unity": held.unity,
        "mean_assimilation": float(held.assimilation.mean()),
        "mean_agreement": float(held.agreement.mean()),
        "mean_anchor_cosine": float(held.anchor.mean()),
        "clean_drift": found.drift,
        "leverage": found.leverage,
        "held_out_prompts": len(held.anchor),
        "restart_scores": list(found.scores),
        "steps": len(found.losses),
        "nearest_tokens": [list(pair) for pair in found.tokens],
        "nearest_prompts": [list(pair) for pair in found.prompts],
        "encoder": {
            "kind": suspect.kind.name,
            "width": suspect.width,
            "depth": suspect.depth,
            "length": suspect.length,
            "slot": suspect.slot,
            "causal": suspect.causal,
        },
    }


def _figures(found: EncoderScan) -> dict[str, Any]:
    values = found.surface.eigenvalues.ravel()
    finite = values[np.isfinite(values)]
    if not finite.size:
        return {}
    low, high = np.quantile(finite, [0.01, 0.99])
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(np.clip(finite, low, high), _BARS, (low, high))
    return {
        "surface": np.round(found.surface.loss.astype(float), 5).tolist(),
        "extent": found.surface.extent,
        "eigenvalues": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
