#!/usr/bin/env bash
# Gathers the wheels (Python 3.12, x86-64 Linux) that a GPU image without network lacks, and says how to install them.
#
#     benchmarks/gpu/pack.sh [FOLDER]        default: build/wheels, which git ignores
#
# The image is taken to have torch 2.11 for CUDA 13, transformers, accelerate, peft, pyarrow, safetensors, numpy, sympy,
# pyyaml, rich, typer, psutil and matplotlib. Of what t3d needs, datasets is left out: only tasks that are data sets of
# a hub import it.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-build/wheels}
most=$((64 * 1024 * 1024))

# omegaconf (its parser needs no runtime package any more), math-verify, and pydantic with what they need. The image has
# typing-extensions, but perhaps not as new as pydantic's core asks for. bitsandbytes is for training in 4 bits.
packages=(
    omegaconf==2.4.0
    math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2
    pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5
    typing-extensions==4.16.0
    bitsandbytes==0.50.2
)
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
mkdir -p "$folder"
rm -f "$folder"/*.whl
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$folder" "${packages[@]}"

# bitsandbytes brings a library for every version of CUDA and ROCm; the one for CUDA 13.0 stays.
python3 - "$folder" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("bitsandbytes-*.whl")
small = wheel.with_suffix(".small")
with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
    names = old.namelist()
    dropped = [n for n in names if "/libbitsandbytes_" in n and "cuda130" not in n and "cpu" not in n]
    for name in names:
        data = old.read(name)
        if name.endswith(".dist-info/RECORD"):
            data = b"".join(line for line in data.splitlines(True) if line.decode().split(",")[0] not in dropped)
        if name not in dropped:
            new.writestr(old.getinfo(name), data)
small.replace(wheel)
PYTHON

size=$(cat "$folder"/*.whl | wc -c)
if ((size >= most)); then echo "$folder is $size bytes; at most $most may travel" >&2; exit 1; fi
echo "$folder: $(ls "$folder"/*.whl | wc -l) wheels, $((size / 1024)) KiB. Install them there with"
echo "    python3 -m pip install --no-index --no-deps $folder/*.whl"
