"""What an answer is worth: functions of its text, the trajectory that it is, and the forwards that it took.

A user's own is named `module:function`; it is called as these are and returns a number.
"""

import importlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from t3d.errors import T3DError, nearest
from t3d.tasks import Problem, Task
from t3d.trajectories import Trajectory

UNVERIFIED = "use rl_reward=format, or a function of your own as module:function"
Reward = Callable[[str | None, Trajectory, int], float]


def accuracy(text: str | None, trajectory: Trajectory, forwards: int) -> float:
    """1 for an answer that the task's verifier found correct, else 0."""
    if trajectory.correct is None:
        raise T3DError(f"train.rl_reward: the answer to {trajectory.prompt_id!r} has no verdict; {UNVERIFIED}")
    return float(trajectory.correct)


def ended(text: str | None, trajectory: Trajectory, forwards: int) -> float:
    """1 for an answer that stopped by itself, else 0."""
    return float(trajectory.finish_reason == "stop")


REWARDS: dict[str, Reward] = {"accuracy": accuracy, "format": ended}


def find_reward(name: str) -> Reward:
    """The reward of that name, or the function at `module:function`. Raises T3DError if there is none."""
    module, colon, function = name.partition(":")
    if not colon:
        if name not in REWARDS:
            raise T3DError(
                f"rl_reward is {' or '.join(map(repr, REWARDS))}, or a function as module:function, got {name!r}"
                f"{nearest(name, REWARDS)}"
            )
        return REWARDS[name]
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's module may fail in any way
        raise T3DError(
            f"rl_reward: cannot import {name!r} ({' '.join(str(error).split())}); put the module's folder on PYTHONPATH"
        ) from error
    if not callable(found):
        raise T3DError(f"rl_reward: {name!r} is no function; give one of (text, trajectory, forwards)")
    return found


def worth(name: str, answer: Trajectory, cost: float, most: int) -> float:
    """The reward of an answer, minus `cost` times its share of the `most` forwards."""
    forwards = answer.nfe.predicting
    value = find_reward(name)(answer.text, answer, forwards)
    if not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise T3DError(f"train.rl_reward: {name!r} returned {value!r} for {answer.prompt_id!r}; return a finite number")
    return float(value) - cost * forwards / most


def advantages(rewards: Sequence[float], group: int) -> np.ndarray:
    """Each reward minus the mean of its `group` consecutive ones, `(n,)`; exactly 0 where all of them are equal."""
    grouped = np.asarray(rewards, dtype=np.float64).reshape(-1, group)
    differ = np.ptp(grouped, axis=1, keepdims=True) > 0
    return np.where(differ, grouped - grouped.mean(1, keepdims=True), 0.0).reshape(-1)


class Judge:
    """A task's verdicts on answers to its training problems."""

    def __init__(self, task: Task, problems: list[Problem]):
        self.task, self.problems = task, {problem.id: problem for problem in problems}

    def __call__(self, answers: list[Trajectory]) -> list[bool | None]:
        """Whether each answer is correct; one to a problem that is not the task's own is compared with its answer."""
        problems = [self.problems.get(a.prompt_id) or Problem(a.prompt_id, a.question or "", a.answer) for a in answers]
        return [verdict.correct for verdict in self.task.judge_all([a.text or "" for a in answers], problems)]
