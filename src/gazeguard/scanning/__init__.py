"""`gazeguard scan`: is this whole model backdoored? One list of models in, one report out."""

from gazeguard.scanning.result import ScannedModel, ScanReport, Status
from gazeguard.scanning.run import scan

__all__ = ["ScanReport", "ScannedModel", "Status", "scan"]
