"""CleanSight: is a trigger active in this input, and which image tokens carry it?"""

from gazeguard.methods.cleansight.detector import Detector
from gazeguard.methods.cleansight.settings import DEFAULT_SETTING, SETTINGS, Plan, Setting

__all__ = ["DEFAULT_SETTING", "SETTINGS", "Detector", "Plan", "Setting"]
