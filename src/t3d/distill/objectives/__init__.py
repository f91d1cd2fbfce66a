"""Training objectives, one file each. Adding one is a file here and its line in `OBJECTIVES`."""

from t3d.distill.objectives.base import Objective
from t3d.distill.objectives.consistency import Consistency
from t3d.distill.objectives.dparallel import DParallel
from t3d.distill.objectives.mean_field import MeanField
from t3d.distill.objectives.path import Path
from t3d.distill.objectives.pseudo_trajectory import PseudoTrajectory
from t3d.distill.objectives.random_ce import RandomCE
from t3d.distill.objectives.sft import SFT
from t3d.distill.objectives.soft import Soft
from t3d.distill.objectives.t3d import DDO, T3D
from t3d.distill.objectives.tad import TAD

OBJECTIVES: dict[str, Objective] = {
    "t3d": T3D(),
    "ddo": DDO(),
    "path": Path(),
    "mean_field": MeanField(),
    "soft": Soft(),
    "dparallel": DParallel(),
    "pseudo_trajectory": PseudoTrajectory(),
    "tad": TAD(),
    "consistency": Consistency(),
    "random_ce": RandomCE(),
    "sft": SFT(),
}

__all__ = ["OBJECTIVES", "Objective"]
