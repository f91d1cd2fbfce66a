"""What a run was computed with."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from t3d import __version__


def versions() -> dict:
    """What computed a run: releases of the libraries that matter, the commit of t3d's source if it is a checkout."""

    def release(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "pyarrow", "numpy", "math-verify")
    return {
        "t3d": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        **{name: release(name) for name in packages},
    }


def _commit() -> str | None:
    """The commit of the checkout that this file is part of, with `+` if tracked files were changed."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed below some other project: not its commit
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
