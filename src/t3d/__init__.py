"""t3d: few-step block-diffusion language models by trajectory self-distillation (arXiv 2602.12262)."""

from importlib import import_module

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
