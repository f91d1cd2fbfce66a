from t3d.distill.config import T3DConfig
from t3d.distill.trainer import T3DTrainer

__all__ = ["T3DConfig", "T3DTrainer"]
