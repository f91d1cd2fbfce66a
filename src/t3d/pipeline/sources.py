"""Where the trajectories that an objective learns from come from: the rollout before, or the task's own solutions."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

from t3d.blocks import geometry
from t3d.config import Recipe
from t3d.distill.config import T3DConfig
from t3d.distill.objective import OBJECTIVES, ROLLOUTS, SOLUTIONS
from t3d.distill.solutions import SolutionDataset
from t3d.errors import T3DError
from t3d.models import stop_ids
from t3d.pipeline.inputs import Inputs
from t3d.trajectories import TrajectoryDataset


class Rollouts:
    """Trajectories of the teacher, or in later rounds of the student."""

    rolls_out = True  # whether a stage before the training makes them

    def check(self, arguments: T3DConfig, inputs: Inputs) -> None:
        """Raises T3DError for settings or data that cannot be trained with."""
        if arguments.rollout_rounds > 1 and not arguments.rollout_rounds <= arguments.max_steps:
            raise T3DError("train.rollout_rounds needs train.max_steps, of at least one step for each round")

    def data(self, folder: Path, recipe: Recipe, inputs: Inputs, model, tokenizer) -> Sequence:
        """The trajectories; folder: the rollout's."""
        return TrajectoryDataset(folder)

    def describe(self, folder: Path, recipe: Recipe, task: str) -> str:
        """A sentence for the student's card."""
        found = TrajectoryDataset(folder)
        verdicts = [verdict for verdict in found.column("correct") if verdict is not None]
        verified = f", {sum(verdicts) / len(verdicts):.1%} of {len(verdicts):,} correct" if verdicts else ""
        decoding = recipe.rollout
        return (
            f"{len(found):,} trajectories of the teacher on training problems of {task}{verified}; temperature "
            f"{decoding.temperature:g}, {decoding.strategy}, {decoding.steps or 'all'} steps per block."
        )


class Solutions:
    """The task's ground-truth responses in the form of trajectories."""

    rolls_out = False

    def check(self, arguments: T3DConfig, inputs: Inputs) -> None:
        for problem in inputs.train_problems:
            inputs.task.solution(problem, Random(0))
        if arguments.rollout_rounds > 1:
            raise T3DError(
                f"train.rollout_rounds: {arguments.objective} learns from ground truth and has no rollouts; set it to 1"
            )

    def data(self, folder: Path, recipe: Recipe, inputs: Inputs, model, tokenizer) -> Sequence:
        stops = stop_ids(model)
        if not stops:
            raise T3DError(
                "model: neither generation_config.json nor config.json gives an eos_token_id to end responses"
            )
        size, count = model.config.window, recipe.task.num_train
        return SolutionDataset(inputs.task, tokenizer, count, size, stops[0], recipe.seed, **geometry(model.config))

    def describe(self, folder: Path, recipe: Recipe, task: str) -> str:
        return f"Ground-truth responses of {task}."


SOURCES = {ROLLOUTS: Rollouts(), SOLUTIONS: Solutions()}


def source(recipe: Recipe) -> Rollouts | Solutions:
    """Where the recipe's objective learns from. Raises T3DError if there is no such objective."""
    return SOURCES[OBJECTIVES[recipe.objective].source]
