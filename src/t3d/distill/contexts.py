"""Contexts that the student itself decodes, for objectives that learn in them."""

import math
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from t3d.decoding import DecodingConfig
from t3d.decoding.sampling import derive_seed
from t3d.distill.batch import TrainingBatch
from t3d.distill.data import StateDataset
from t3d.distill.objective import OnPolicy
from t3d.engine import Engine
from t3d.trajectories import Trajectory


def own_contexts(
    student: nn.Module, dataset: StateDataset, items: list[int], objective: OnPolicy, base: list[int]
) -> tuple[list[dict], int]:
    """States of responses that the student decodes now, in few steps, to the prompts of the dataset's `items`.

    They depend on `base`, numbers that seed what is random, and on each prompt's place in the dataset, not on which
    process has it. Also the tokens that went through the student.
    """
    decoding = DecodingConfig(
        steps=min(int(np.random.default_rng(base).choice(objective.on_policy_steps)), dataset.block_size),
        temperature=objective.on_policy_temperature,
    )
    seeds = [derive_seed(*base, item) for item in items]
    engine = Engine(student, max_batch_size=len(items))
    trajectories, forwarded = own_answers(engine, dataset, items, seeds, decoding)
    examples = [
        dataset.states(trajectory, np.random.default_rng([*base, item]))
        for trajectory, item in zip(trajectories, items, strict=True)
    ]
    return examples, forwarded


def own_answers(
    engine, dataset: StateDataset, items: list[int], seeds: list[int], decoding: DecodingConfig
) -> tuple[list[Trajectory], int]:
    """Answers of the engine's model to the prompts of the dataset's `items`, one for each of the seeds, as long as the
    longest that the dataset has to them; and the tokens that went through the model."""
    given = [dataset.trajectory(item) for item in items]
    decoding = replace(decoding, max_tokens=max(len(trajectory.response_ids) for trajectory in given))
    answers = engine.generate([trajectory.prompt_ids for trajectory in given], decoding, seeds=seeds)
    forwards = [answer.nfe.predicting + answer.nfe.commit for answer in answers]
    answers = [
        replace(answer, prompt_id=t.prompt_id, question=t.question, answer=t.answer)
        for answer, t in zip(answers, given, strict=True)
    ]
    if dataset.full:  # the whole text every time
        return answers, sum(n * (len(a.prompt_ids) + a.canvas) for n, a in zip(forwards, answers, strict=True))
    return answers, sum(len(answer.prompt_ids) for answer in answers) + sum(forwards) * dataset.block_size


def with_drafts(batch: TrainingBatch, drafts: Tensor) -> TrainingBatch:
    """The batch with `drafts` (m,) shown at its supervised positions, which stay supervised."""
    ids = batch.input_ids.flatten().index_copy(0, batch.select, drafts)
    return replace(batch, input_ids=ids.view_as(batch.input_ids))


def turns(step: int, share: float) -> bool:
    """Whether `step` (0, 1, ...) belongs to the share of steps that is spread evenly over all."""
    return math.floor((step + 1) * share) > math.floor(step * share)
