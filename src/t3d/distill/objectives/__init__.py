"""Training objectives, one file each. Adding one is a file here and its line in `OBJECTIVES`."""

from t3d.distill.objectives.base import Objective
from t3d.distill.objectives.sft import SFT
from t3d.distill.objectives.t3d import T3D

OBJECTIVES: dict[str, Objective] = {"t3d": T3D(), "sft": SFT()}

__all__ = ["OBJECTIVES", "Objective"]
