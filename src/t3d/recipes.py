"""The recipes that come with t3d."""

import re
from pathlib import Path

import yaml

from t3d.disk import write_whole
from t3d.errors import T3DError, nearest

FOLDER = Path(__file__).parent / "assets" / "recipes"  # in a clone a link to its recipes/


def recipes() -> dict[str, str]:
    """Every recipe's name, as `copy` takes it, and what its first line says."""
    names = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("**/*.yaml")]
    names.sort(key=lambda name: ("/" in name, name))
    return {name: _read(name).partition("\n")[0].removeprefix("# ").rstrip(":") for name in names}


def copy(name: str, folder: Path, force: bool = False) -> list[Path]:
    """Write a recipe and those it builds on into `folder`, under their names; returns the files.

    Raises:
        T3DError: one line: no such recipe, or, without `force`, a file that is there and says something else.
    """
    if name not in recipes():
        raise T3DError(f"there is no recipe {name!r}{nearest(name, recipes())}; `t3d recipes list` lists them")
    texts = {}
    while name not in texts:
        # The project's own page of results is in its repository alone.
        texts[name] = re.sub(r"^results: .*\n", "", _read(name), flags=re.MULTILINE)
        base = yaml.safe_load(texts[name]).get("recipe")
        name = str(Path(name).parent / Path(base).with_suffix("")) if base else name
    files = {folder / f"{name}.yaml": text for name, text in reversed(texts.items())}
    for path, text in files.items():
        if not force and path.exists() and _other(path, text):
            raise T3DError(f"{path} is there and differs; --force replaces it")
    for path, text in files.items():
        write_whole(path, text)
    return list(files)


def _read(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def _other(path: Path, text: str) -> bool:
    return not path.is_file() or path.read_bytes() != text.encode()
