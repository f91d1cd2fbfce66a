"""Groups of answers that the student decodes to one prompt each, as examples with advantages."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from t3d.decoding import DecodingConfig
from t3d.decoding.sampling import derive_seed
from t3d.distill.batch import COLUMNS
from t3d.distill.contexts import own_answers
from t3d.distill.data import StateDataset
from t3d.distill.objective import Reinforced
from t3d.distill.rewards import advantages, worth
from t3d.errors import T3DError
from t3d.trajectories import Trajectory


def own_groups(
    engine, dataset: StateDataset, items: list[int], objective: Reinforced, judge: Callable | None, base: list[int]
) -> tuple[list[dict], list[tuple[Trajectory, float, float]], int]:
    """Answers that the engine's model decodes now, `rl_group` to each prompt of the dataset's `items`.

    judge: verdicts of a list of answers, see `t3d.distill.rewards.Judge`. base: numbers that seed what is random.
    Returns the examples of the groups whose rewards differ, with a column `advantage`; every answer with its reward and
    advantage; and the tokens that went through the model. Without such a group there is one example that supervises
    nothing.
    """
    each = [item for item in items for _ in range(objective.rl_group)]
    seeds = [derive_seed(*base, item, number) for item in items for number in range(objective.rl_group)]
    answers, forwarded = own_answers(engine, dataset, each, seeds, decoding(objective, dataset.block_size))
    given = [dataset.trajectory(item) for item in each]
    answers = [
        replace(answer, prompt_id=t.prompt_id, question=t.question, answer=t.answer)
        for answer, t in zip(answers, given, strict=True)
    ]
    if judge is not None:
        verdicts = judge(answers)
        answers = [replace(answer, correct=correct) for answer, correct in zip(answers, verdicts, strict=True)]
    rewards = [  # the teacher's answer in full steps takes a forward for every token
        worth(objective.rl_reward, answer, objective.rl_cost, len(t.response_ids))
        for answer, t in zip(answers, given, strict=True)
    ]
    gains = advantages(rewards, objective.rl_group)
    examples = [_example(dataset, answers[i], gains[i], seeds[i]) for i in np.flatnonzero(gains)]
    if not examples:
        one = _example(dataset, answers[0], 0.0, seeds[0])
        examples = [{name: x[:0] if name in _FLAT else x for name, x in one.items()}]
    return examples, list(zip(answers, rewards, gains.tolist(), strict=True)), forwarded


_FLAT = (*COLUMNS, "select", "supervised_copy", "supervised_block")


def decoding(objective: Reinforced, block_size: int) -> DecodingConfig:
    """How the answers are decoded: in few steps, or with a threshold."""
    settings = {"steps": min(objective.rl_steps, block_size), "temperature": objective.rl_temperature}
    if objective.rl_threshold:
        settings |= {"strategy": "low_confidence_dynamic", "threshold": objective.rl_threshold}
    return DecodingConfig(**settings)


def _example(dataset: StateDataset, answer: Trajectory, advantage: float, seed: int) -> dict:
    example = dataset.states(answer, np.random.default_rng(seed))
    return example | {"advantage": np.full(len(example["select"]), advantage)}


def save_batches(batches: list[dict], folder: Path, process: int) -> None:
    """Write the batches that this process goes on with."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(batches, folder / _file(process))


def load_batches(folder: Path, process: int, device) -> list[dict]:
    """Read what `save_batches` wrote."""
    path = folder / _file(process)
    if not path.exists():
        raise T3DError(
            f"{folder} lacks the answers in use, {path.name}; continue with as many processes and the rl_updates that "
            "it was saved with"
        )
    return torch.load(path, map_location=device)


def _file(process: int) -> str:
    return f"answers-{process:05d}.pt"
