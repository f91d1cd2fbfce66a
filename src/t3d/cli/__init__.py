"""The command line, by what its commands take; `t3d --help` lists them in the order of these imports."""

from t3d.cli import recipes
from t3d.cli.app import app, main

# isort: split
from t3d.cli import checkpoints

__all__ = ["app", "checkpoints", "main", "recipes"]
