"""What an objective is, and the sums that several of them use."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t3d.distill.config import T3DConfig
from t3d.distill.data import TrainingBatch
from t3d.distill.states import trajectory_mask

# Runs a model and applies `head(hidden (m, width), lm_head weight)` at the supervised positions: of the batch at hand,
# or of another given as second argument.
Forward = Callable[..., Any]


class Objective:
    """How states are drawn, and the loss on them."""

    needs_reference = False
    beyond_length = False  # whether the tokens behind the stop, which nobody reads, are supervised
    on_policy = False  # whether it learns in contexts that the student itself decodes, too
    unit = "token"  # what the loss is a mean over: the supervised "token"s, the noisy "block"s or the "sequence"s

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


def segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    """Sum of `values (m,)` in each segment `0 .. max`, `(segments,)`."""
    segments = int(segment.max()) + 1 if len(segment) else 0
    return values.new_zeros(segments).index_add(0, segment, values)


def segment_mean(values: Tensor, segment: Tensor) -> Tensor:
    """Mean of `values (m,)` in each segment, `(segments,)`."""
    return segment_sum(values, segment) / segment_sum(torch.ones_like(values), segment)
