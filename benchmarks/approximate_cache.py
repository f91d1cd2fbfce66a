"""What `approximate_cache` costs in accuracy and saves in time: a full-attention teacher of word problems, all caches.

    python benchmarks/approximate_cache.py FOLDER

Writes FOLDER/start, the embedded teacher's weights as dllm's `mdlm` (a full-attention Qwen3), and runs
recipes/full-attention-teacher.yaml with it: training, which takes an hour on one core, and an evaluation with and
without caches. A run that was killed goes on with the same command. The table has the answers that only one of the two
has right, of the same problems.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from t3d.embedded import EMBEDDED
from t3d.evaluation.compare import compare
from t3d.evaluation.summary import read_summary
from t3d.trajectories import TrajectoryDataset

RECIPE = Path(__file__).parents[1] / "recipes" / "full-attention-teacher.yaml"
TYPE = {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3", "block_size": None}  # null: no blocks


def write_start(folder: Path) -> None:
    if not folder.exists():
        shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("config.json"))
        config = json.loads((EMBEDDED / "config.json").read_text()) | TYPE
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_start(folder / "start")
    run = folder / "teacher"
    for stage in ("train", "eval"):
        command = [sys.executable, "-m", "t3d", stage, RECIPE, f"run_dir={run}", f"model.path={folder / 'start'}"]
        subprocess.run(command, check=True)

    print("| steps | cache | accuracy | only without, only with | tokens/s | times |\n|---:|---|---:|---:|---:|---:|")
    exact: dict[int, dict] = {}
    for row in read_summary(run / "summary.json")["rows"]:
        kind = row["other"].get("approximate_cache", "none")
        base = exact.setdefault(row["steps"], row)  # comes first
        here, there = (TrajectoryDataset(run / "eval" / r["results"]) for r in (row, base))
        found = compare(here, there)
        low, high = (100 * bound for bound in row["ci95"])
        print(
            f"| {row['steps']} | {kind} | {100 * row['accuracy']:.1f} ({low:.1f}-{high:.1f}) "
            f"| {found.only_b}, {found.only_a} | {row['tps']:.0f} | {row['tps'] / base['tps']:.1f} |"
        )


if __name__ == "__main__":
    main()
