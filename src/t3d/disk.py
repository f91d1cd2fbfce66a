"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path

from t3d.errors import T3DError


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it; T3DError if that fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise T3DError(f"cannot write {path}: {error.strerror}") from error
