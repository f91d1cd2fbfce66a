"""Checkpoint folders on disk: found, read and checked before anything is loaded, and replaced whole or not at all."""

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from t3d.errors import T3DError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py", "*.model", "LICENSE*"]  # of a checkpoint on a hub
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def local_folder(name: str | os.PathLike, needs: str = "config.json") -> Path:
    """The folder of a checkpoint, which has a file `needs`: `name` itself, or where the hub's cache keeps the hub id.

    Raises:
        T3DError: it is neither, or the hub cannot give it.
    """
    path = Path(name)
    if not path.exists() and _previous(path).exists():
        path = _previous(path)
    if path.exists():
        if not (path / needs).exists():
            raise T3DError(f"{name} is not a checkpoint folder: it has no {needs}")
        return path
    name = str(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise T3DError(f"no such checkpoint folder: {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # of many kinds: no network, no such id, no permission
        raise T3DError(
            f"no checkpoint {name}: not a folder here, and not found on the hub ({first_line(error)})"
        ) from error


def read_json(path: Path) -> dict:
    """A JSON object; T3DError names the file that is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise T3DError(f"cannot read the configuration {path}: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise T3DError(f"cannot read the configuration {path}: it is not a JSON object")
    return value


def read_config(folder: Path) -> dict:
    """A checkpoint's config.json, whose `model_type` is a text where there is one; raises T3DError."""
    values = read_json(folder / "config.json")
    if not isinstance(kind := values.get("model_type"), str | None):
        raise T3DError(f"{folder / 'config.json'}: model_type must be a text, got {str(kind)[:80]}")
    return values


def check_weights(folder: Path) -> None:
    """Raises T3DError, naming the file, where a shard is missing or cut short. Reads headers only."""
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise T3DError(f"{folder / INDEX} has no weight_map")
        if strange := [n for n in names.values() if not (isinstance(n, str) and n and Path(n).name == n)]:
            raise T3DError(f"{folder / INDEX}: weight_map names {strange[0]!r}, which is no file of this folder")
        files = sorted(set(names.values()))
    else:
        files = [WEIGHTS]
    for name in files:
        path = folder / name
        if not path.exists():
            more = f" (of {len(files)} that {INDEX} names)" if len(files) > 1 else ""
            if any(folder.glob("pytorch_model*.bin")):
                more = "; there is a pytorch_model.bin, but only safetensors are read"
            raise T3DError(f"cannot load the weights of {folder}: {name} is missing{more}")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise T3DError(
                f"cannot load the weights of {folder}: {name} is cut short or damaged ({first_line(error)})"
            ) from error


@contextlib.contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[Path]:
    """Gives an empty folder to fill; at the end of the block it becomes `folder`, at once. A failure leaves `folder` as
    it was, and so does a kill; what that left beside it, the next call removes.

    Raises:
        T3DError: when it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise T3DError(f"cannot write {folder}: a file has this name")
    temporary = folder.parent / f".{folder.name}.saving"
    try:
        _finish_replacing(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise T3DError(f"cannot write {folder}: {error.strerror}") from error
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors' own files are readable by their owner only
            _sync(path)
        _sync(temporary)
        _swap(temporary, folder)
        _sync(folder.parent)
    except OSError as error:
        raise T3DError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _previous(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.previous"


def _swap(new: Path, folder: Path) -> None:
    """`new` takes the name `folder`; what had it, if anything, goes."""
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        folder.rename(_previous(folder))  # a kill after this line: `local_folder` still finds it
        new.rename(folder)
        shutil.rmtree(_previous(folder))


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, if system and file system can (Linux, but not NFS)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code))


def _finish_replacing(folder: Path) -> None:
    """Undo or end what a kill between the two renames of `_swap` left."""
    if _previous(folder).exists():
        if folder.exists():
            shutil.rmtree(_previous(folder))
        else:
            _previous(folder).rename(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
