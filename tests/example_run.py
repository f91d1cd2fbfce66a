"""A run folder without a model: answers of `word_problems`, garbled more the fewer the steps."""

import json
import random
from pathlib import Path

import numpy as np

from t3d.decoding import DecodingConfig
from t3d.evaluation import summarise, write_summary
from t3d.evaluation.rows import EXTRACTED, REASON, SECONDS
from t3d.tasks import TaskConfig, get_task
from t3d.tasks.math import extract_answer
from t3d.tasks.word_problems import build_tokenizer, solution
from t3d.trajectories import NFE, Trajectory, TrajectoryWriter
from t3d.trajectories.pieces import PIECES, Pieces

WRONG = {("teacher", 4): 0.01, ("teacher", 2): 0.03, ("teacher", 1): 0.08}
WRONG |= {("student", 4): 0.01, ("student", 2): 0.015, ("student", 1): 0.03}  # share of tokens replaced


def answer(task, tokenizer, problem, model, steps, block=4) -> Trajectory:
    rng = random.Random(f"{problem.id}/{model}/{steps}")
    prompt = task.prompt(problem, tokenizer)
    ids = [*tokenizer.encode(solution(problem, rng), add_special_tokens=False), tokenizer.eos_token_id]
    ids = [rng.randrange(5, len(tokenizer)) if rng.random() < WRONG[model, steps] else i for i in ids]
    length = len(ids)
    ids += [tokenizer.eos_token_id] * (-(len(prompt) + length) % block)
    step_map, confidence, position = [], [], len(prompt)
    while position < len(prompt) + len(ids):
        size = block - position % block
        order = rng.sample(range(size), size)
        step_map += [place * steps // block for place in order]
        confidence += [float(np.float32(rng.betavariate(8, 1 + place / 2))) for place in order]
        position += size
    text = tokenizer.decode(ids[:length], skip_special_tokens=True)
    blocks = -(-len(ids) // block)
    trajectory = Trajectory(
        prompt_ids=prompt,
        response_ids=ids,
        step_map=step_map,
        confidence=confidence,
        length=length,
        finish_reason="stop",
        nfe=NFE(1, blocks * steps, 1),
        block_size=block,
        text=text,
        prompt_id=problem.id,
        question=problem.question,
        answer=problem.answer,
        correct=task.verify(text, problem),
        extra={SECONDS: 0.002 * steps, EXTRACTED: extract_answer(text), REASON: ""},
    )
    trajectory.extra[PIECES] = Pieces(tokenizer).of(trajectory)
    return trajectory


def example_run(run: Path, count=40, models=("teacher", "student"), change=lambda trajectory: trajectory) -> Path:
    tokenizer, task = build_tokenizer(), get_task(TaskConfig(name="word_problems"))
    problems, rows = task.problems("test", count), []
    for model in models:
        for steps in (4, 2, 1):
            results = f"{model}/steps{steps}"
            answers = [change(answer(task, tokenizer, p, model, steps)) for p in problems]
            with TrajectoryWriter(run / "eval" / results, {"model": model}) as writer:
                for trajectory in answers:
                    writer.write(trajectory)
            config = DecodingConfig(block_size=4, steps=steps)
            rows.append(
                summarise(
                    answers,
                    config,
                    model,
                    objective="t3d" if model == "student" else None,
                    hardware="x86_64 CPU, 2 threads",
                    batch_size=64,
                    results=results,
                )
            )
    versions = {"t3d": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    times = {"rollout": 41.0, "train": 108.0, "eval": 12.0, "total": 161.0}
    write_summary(run / "summary.json", task="word_problems", seed=0, versions=versions, wall_seconds=times, rows=rows)
    history, rng = [], random.Random(0)
    for step in range(10, 260, 10):
        loss = 2 / (1 + step / 40) + rng.random() / 10
        entry = {
            "loss": loss,
            "loss_path": loss / 2,
            "grad_norm": 1 + rng.random(),
            "learning_rate": 1e-3 * (1 - step / 270),
        }
        history.append(entry | {"step": step, "epoch": step / 100})
    history.append({"step": 260, "epoch": 2.6, "train_runtime": 100.0, "train_loss": 0.5, "total_flos": 1e15})
    folder = run / "train" / "checkpoint-260"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return run
