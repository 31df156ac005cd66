"""AMDET: search a text encoder for an embedding that acts as a trigger (arXiv:2512.00343)."""

from gazeguard.methods.amdet.decision import Gate, References
from gazeguard.methods.amdet.scan import EncoderScan, scan_encoder
from gazeguard.methods.amdet.settings import PUBLISHED, Gates, Settings

__all__ = [
    "PUBLISHED",
    "EncoderScan",
    "Gate",
    "Gates",
    "References",
    "Settings",
    "scan_encoder",
]
