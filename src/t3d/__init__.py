"""t3d: few-step block-diffusion language models by trajectory self-distillation (arXiv 2602.12262)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same for type checkers and the documentation, which do not run the code
    from t3d.decoding import DecodingConfig as DecodingConfig
    from t3d.distill import T3DConfig as T3DConfig
    from t3d.distill import T3DTrainer as T3DTrainer
    from t3d.engine import Engine as Engine
    from t3d.errors import T3DError as T3DError
    from t3d.evaluation import evaluate as evaluate
    from t3d.models import load_model as load_model
    from t3d.models import save_model as save_model
    from t3d.trajectories import Trajectory as Trajectory

__version__ = "0.1.0"

# Imported on first use, so that `t3d --help` does not wait for torch.
_EXPORTS = {
    "load_model": "t3d.models",
    "save_model": "t3d.models",
    "Engine": "t3d.engine",
    "DecodingConfig": "t3d.decoding",
    "Trajectory": "t3d.trajectories",
    "T3DTrainer": "t3d.distill",
    "T3DConfig": "t3d.distill",
    "evaluate": "t3d.evaluation",
    "T3DError": "t3d.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 't3d' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
