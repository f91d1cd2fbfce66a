"""What an objective is, and the sums that several of them use."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t3d.distill.config import T3DConfig
from t3d.distill.data import TrainingBatch
from t3d.distill.states import Response, State, trajectory_mask

# Runs a model and applies `head(hidden (m, width), lm_head weight)` at the supervised positions: of the batch at hand,
# or of another given as second argument.
Forward = Callable[..., Any]


class Objective:
    """How states are drawn, and the loss on them."""

    needs_reference = False
    lasting_reference = False  # whether a fixed reference's values are few, and the same whatever the student does
    beyond_length = False  # whether the tokens behind the stop, which nobody reads, are supervised
    on_policy = False  # whether it learns in contexts that the student itself decodes, too
    unit = "token"  # what the loss is a mean over: supervised "token"s, noisy "block"s or "sequence"s
    keys: tuple[str, ...] = ()  # how settings begin that are nothing to objectives which do not name them here
    round_interval = 0  # after how many optimizer steps the reference becomes the student, unless told; 0: never

    def states(
        self, response: Response, rng: np.random.Generator, config: T3DConfig, progress: float = 1.0
    ) -> list[State]:
        """The noisy states of a response that share its clean copy: by default, `states_per_sequence` draws of `state`.

        progress: share of the training that is done, 0..1.
        """
        draws = range(config.states_per_sequence)
        return [State(*self.state(response.block, response.rank, rng, config)) for _ in draws]

    def state(
        self, block: np.ndarray, rank: np.ndarray, rng: np.random.Generator, config: T3DConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which of a sequence's `n` response tokens are masked, and the weight of each, both `(n,)`."""
        masked = trajectory_mask(block, rank, rng, config.mask_exponent, config.mask_per_block, config.order)
        return masked, np.ones(len(block))

    def random_ratio(self, config: T3DConfig) -> float:
        """Share of the masked inputs that become random tokens."""
        return config.random_ratio

    def loss(
        self,
        batch: TrainingBatch,
        student: Forward,
        reference: Forward | None,
        config: T3DConfig,
        mask_id: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and detached scalars to log."""
        raise TypeError(f"{type(self).__name__} has no loss")


def segments(segment: Tensor) -> int:
    """How many segments `0 .. max` there are; of no positions none."""
    return int(segment.max()) + 1 if len(segment) else 0


def mean(values: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean of `values`, or of those that the boolean `where` picks; 0 of none, so that an empty term costs nothing."""
    where = torch.ones_like(values) if where is None else where.to(values.dtype)
    return (values * where).sum() / where.sum().clamp(min=1)


def segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    """Sum of `values (m,)` in each segment `0 .. max`, `(segments,)`."""
    return values.new_zeros(segments(segment)).index_add(0, segment, values)


def segment_mean(values: Tensor, segment: Tensor) -> Tensor:
    """Mean of `values (m,)` in each segment, `(segments,)`."""
    return segment_sum(values, segment) / segment_sum(torch.ones_like(values), segment)
