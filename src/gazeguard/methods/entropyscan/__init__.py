"""EntropyScan: did somebody plant a backdoor in a whole vision-language model?

`decide` judges a suspect's `Sight` against those of its base and of benign fine-tunes.
"""

from gazeguard.methods.entropyscan.decision import Standing, alike, decide, standing
from gazeguard.methods.entropyscan.settings import Settings
from gazeguard.methods.entropyscan.sight import Sight
from gazeguard.methods.entropyscan.statistics import STATISTICS

__all__ = ["STATISTICS", "Settings", "Sight", "Standing", "alike", "decide", "standing"]
