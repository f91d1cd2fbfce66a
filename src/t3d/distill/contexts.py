"""Contexts that the student itself decodes, for objectives that learn in them."""

import math

import numpy as np
from torch import nn

from t3d.decoding import DecodingConfig
from t3d.decoding.sampling import derive_seed
from t3d.distill.data import StateDataset
from t3d.distill.objective import OnPolicy
from t3d.engine import Engine


def own_contexts(
    student: nn.Module, dataset: StateDataset, items: list[int], objective: OnPolicy, base: list[int]
) -> tuple[list[dict], int]:
    """States of responses that the student decodes now, in few steps, to the prompts of the dataset's `items`.

    They depend on `base`, numbers that seed what is random, and on each prompt's place in the dataset, not on which
    process has it. Also the tokens that went through the student.
    """
    block_size = student.config.block_size
    given = [dataset.trajectory(item) for item in items]
    decoding = DecodingConfig(
        steps=min(int(np.random.default_rng(base).choice(objective.on_policy_steps)), block_size),
        temperature=objective.on_policy_temperature,
        max_tokens=max(len(trajectory.response_ids) for trajectory in given),
    )
    engine = Engine(student, max_batch_size=len(given))
    seeds = [derive_seed(*base, item) for item in items]
    trajectories = engine.generate([trajectory.prompt_ids for trajectory in given], decoding, seeds=seeds)
    examples = [
        dataset.states(trajectory, np.random.default_rng([*base, item]))
        for trajectory, item in zip(trajectories, items, strict=True)
    ]
    blocks = sum(trajectory.nfe.predicting + trajectory.nfe.commit for trajectory in trajectories)
    return examples, sum(len(trajectory.prompt_ids) for trajectory in trajectories) + blocks * block_size


def turns(step: int, share: float) -> bool:
    """Whether `step` (0, 1, ...) belongs to the share of steps that is spread evenly over all."""
    return math.floor((step + 1) * share) > math.floor(step * share)
