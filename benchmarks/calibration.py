"""Whether settings certified on some problems keep their promise on others: word problems, the embedded teacher.

    python benchmarks/calibration.py FOLDER [--dev 2000] [--test 1000] [--size 750] [--resamples 20] [--blocks 1 2]

Every setting of a grid answers all problems once (kept in FOLDER; a second call decodes nothing). Then calibration sets
are drawn from the dev problems, a setting is chosen on each, and its losses against the reference on the test problems,
none of which a choice has seen, are compared with alpha.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from t3d import DecodingConfig, Engine, load_model
from t3d.decoding.guarantee import candidates, certified, reference_setting
from t3d.embedded import EMBEDDED
from t3d.evaluation import evaluate, wilson
from t3d.evaluation.rows import setting
from t3d.tasks import TaskConfig, get_task
from t3d.trajectories import TrajectoryDataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dev", type=int, default=2000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--size", type=int, default=750, help="problems of a calibration set")
    parser.add_argument("--resamples", type=int, default=20)
    parser.add_argument("--strategy", nargs="+", default=["adaptive"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--alpha", nargs="+", type=float, default=[0.02, 0.05, 0.1])
    parser.add_argument("--delta", type=float, default=0.05)
    options = parser.parse_args()

    model, tokenizer = load_model(EMBEDDED)
    task, engine = get_task(TaskConfig(name="word_problems")), Engine(model, tokenizer, max_batch_size=128)
    base = DecodingConfig(max_tokens=128).at(model.config.block_size)
    reference, grid = reference_setting(base), candidates(base, options.strategy, options.blocks)
    names: list[str] = []
    right, length, forwards = {}, {}, {}  # by split: (settings, problems), the reference first
    for split, count in (("dev", options.dev), ("test", options.test)):
        problems = task.problems(split, count)
        tables = []
        for config in (reference, *grid):
            [row] = evaluate(
                model, tokenizer, task, problems, [config], engine=engine, output=options.folder / split, progress=True
            )
            answers = TrajectoryDataset(options.folder / split / row.results)
            names.append(setting(row.to_dict()))
            tables.append([(t.correct, t.length, t.nfe.predicting) for t in answers])
            print(f"{split}, {names[-1]}: {row.accuracy:.1%}, {row.tpf:.2f} tokens per forward", file=sys.stderr)
        table = np.array(tables, dtype=np.int64)  # (settings, problems, 3)
        right[split], length[split], forwards[split] = table[..., 0] == 1, table[..., 1], table[..., 2]

    lost = {split: right[split][0] & ~right[split][1:] for split in right}  # (settings, problems)
    true = lost["test"].mean(1)
    tpf = length["test"].sum(1) / forwards["test"].sum(1)
    rng = np.random.default_rng(0)
    samples = [rng.choice(options.dev, options.size, replace=False) for _ in range(options.resamples)]
    for alpha in options.alpha:
        chosen = []
        for mine in samples:
            passed = certified(lost["dev"][:, mine].sum(1).tolist(), options.size, alpha, options.delta)
            speed = length["dev"][1:, mine].sum(1) / forwards["dev"][1:, mine].sum(1)
            chosen += [max(np.flatnonzero(passed), key=speed.__getitem__)] if any(passed) else []
        kept = sum(true[i] <= alpha for i in chosen)
        print(f"alpha {alpha:g}: {len(chosen)} of {len(samples)} sets give a setting, {kept} keep the promise")
        for i, times in Counter(chosen).most_common():
            low, high = wilson(lost["test"][i].sum(), options.test)
            print(
                f"  {times} times {names[1 + i]}: {tpf[1 + i]:.2f} tokens per forward (reference {tpf[0]:.2f}), "
                f"held-out losses {true[i]:.1%} ({low:.1%} to {high:.1%}), "
                f"accuracy {right['test'][1 + i].mean():.1%} (reference {right['test'][0].mean():.1%})"
            )


if __name__ == "__main__":
    main()
