"""What a training step of each objective costs beside one of `t3d`: time and floating point operations.

    python benchmarks/objectives.py [OBJECTIVE ...] [--json FILE] [--rounds 3] [--steps 4] [--threads 1]

Every objective, with its defaults, trains the embedded model by the trainer itself: a batch of 16 of the teacher's own
trajectories, AdamW, float32 on the CPU. Rounds are interleaved; in each the first two steps warm up, the others are
timed in seconds of processor time, decoding of own contexts or answers included. The table has medians over rounds of
these and of operations (2 per weight and token of a forward, 4 more of a backward), both relative to `t3d`.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback

from t3d.decoding import DecodingConfig
from t3d.distill import T3DConfig, T3DTrainer
from t3d.distill.objective import OBJECTIVES, ROLLOUTS
from t3d.distill.rewards import Judge
from t3d.embedded import checkpoint
from t3d.engine import Engine
from t3d.models import load_model
from t3d.tasks import TaskConfig, get_task

WARM = 2  # steps


class Clock(TrainerCallback):
    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.process_time())


def measure(name: str, trajectories: list, judge: Judge, steps: int) -> tuple[float, float]:
    """Seconds and operations of a step, means over `steps` steps after the warm-up."""
    model, tokenizer = load_model(checkpoint("embedded"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = T3DConfig(
            output_dir=folder,
            objective=name,
            max_steps=WARM + steps,
            per_device_train_batch_size=16,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        clock = Clock()
        trainer = T3DTrainer(model, arguments, trajectories, processing_class=tokenizer, judge=judge, callbacks=[clock])
        trainer.train()
    return (clock.ends[-1] - clock.ends[WARM - 1]) / steps, trainer.state.total_flos / (WARM + steps)


def main(argv: list[str] | None = None) -> None:
    known = [name for name, objective in OBJECTIVES.items() if objective.source == ROLLOUTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objectives", nargs="*", metavar="OBJECTIVE", help=f"default: {' '.join(known)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if unknown := set(args.objectives) - set(known):
        parser.error(f"unknown objective {min(unknown)!r}; known: {', '.join(known)}")
    names = ["t3d", *(name for name in args.objectives or known if name != "t3d")]
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()

    model, tokenizer = load_model(checkpoint("embedded"))
    task = get_task(TaskConfig(name="word_problems"))
    problems = task.problems("train", 128)
    prompts = [task.prompt(problem, tokenizer) for problem in problems]
    answers = Engine(model, tokenizer).generate(prompts, DecodingConfig(max_tokens=128))
    trajectories = [replace(a, prompt_id=problem.id) for a, problem in zip(answers, problems, strict=True)]
    judge = Judge(task, problems)

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            found[name].append(measure(name, trajectories, judge, args.steps))
        print(f"round {number + 1} of {args.rounds}", flush=True)
    rows = {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in values),
            "time": statistics.median(s / b for (s, _), (b, _) in zip(values, found["t3d"], strict=True)),
            "operations": statistics.median(o / b for (_, o), (_, b) in zip(values, found["t3d"], strict=True)),
        }
        for name, values in found.items()
    }
    print("| objective | seconds per step | time | operations |\n|---|---:|---:|---:|")
    for name, row in rows.items():
        print(f"| `{name}` | {row['seconds']:.2f} | {row['time']:.2f} | {row['operations']:.2f} |")
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": args.threads, "rounds": args.rounds}
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
