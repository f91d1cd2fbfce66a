"""Files that are written whole or not at all."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from t3d.errors import T3DError


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it; T3DError if that fails."""
    with writing_whole(path) as out:
        out.write(text)


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[TextIO]:
    """A text file to write to, under a temporary name; it gets its own at the end of the block. If the block fails, it
    goes; T3DError if the writing does."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise T3DError(f"cannot write {path}: {error.strerror}") from error
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is in `locked(folder)`; a killed one is not. T3DError if it cannot be opened."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise T3DError(f"cannot use {folder}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
