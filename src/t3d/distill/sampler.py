"""In which order a run draws trajectories, and how far into training each draw lies."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """What a dataset is asked for."""

    item: int
    epoch: int
    progress: float  # share of the training that is done before the optimizer step this draw belongs to, 0..1


class DrawSampler(Sampler[Draw]):
    """Every item once per epoch, shuffled by (seed, epoch) alone: a resumed run draws what an uninterrupted one would.

    size: items. batch_size: draws in one optimizer step, over all processes. max_steps: optimizer steps of the run; 0:
    `epochs` of them. times: optimizer steps in a row with the same draws; above 1, an epoch's last batch is filled up
    with its first items.
    """

    def __init__(self, size: int, batch_size: int, epochs: float, max_steps: int = 0, seed: int = 0, times: int = 1):
        self.size, self.batch_size, self.seed, self.times, self.epoch = size, batch_size, seed, times, 0
        self.steps_in_epoch = math.ceil(size / batch_size) * times
        self.max_steps = max_steps if max_steps > 0 else math.ceil(epochs * self.steps_in_epoch)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size if self.times == 1 else self.steps_in_epoch * self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        if self.times > 1:
            batches = np.resize(order, (self.steps_in_epoch // self.times, self.batch_size))
            order = batches.repeat(self.times, axis=0).flatten()
        for place, item in enumerate(order.tolist()):
            step = self.epoch * self.steps_in_epoch + place // self.batch_size
            yield Draw(item, self.epoch, min(step / self.max_steps, 1.0))
