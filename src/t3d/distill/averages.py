"""Means of what is logged, over micro-batches and processes."""

from collections import defaultdict

import torch
from accelerate.utils import gather_object
from torch import Tensor


class Averages:
    """Sums and counts by name. They stay on the device until they are asked for, so that a step does not wait."""

    def __init__(self):
        self._sums: dict[str, list[Tensor | float]] = defaultdict(list)
        self._counts: dict[str, list[Tensor | float]] = defaultdict(list)

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        self._sums[name].append(total.detach() if isinstance(total, Tensor) else total)
        self._counts[name].append(count.detach() if isinstance(count, Tensor) else count)

    def drain(self) -> dict[str, float]:
        """The means over all processes since the last time; every process must call it."""
        mine = {name: (_sum(self._sums[name]), _sum(self._counts[name])) for name in self._sums}
        self._sums.clear()
        self._counts.clear()
        return means(mine)


def means(mine: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The means over all processes of (sum, count) by name, which some may not have. Every process must call it."""
    everyone: dict[str, tuple[float, float]] = {}
    for part in gather_object([mine]):
        for name, (total, count) in part.items():
            before = everyone.get(name, (0.0, 0.0))
            everyone[name] = (before[0] + total, before[1] + count)
    return {name: total / count for name, (total, count) in everyone.items() if count}


def _sum(values: list[Tensor | float]) -> float:
    tensors = [value.double() for value in values if isinstance(value, Tensor)]
    numbers = [value for value in values if not isinstance(value, Tensor)]
    return sum(numbers) + (float(torch.stack(tensors).sum()) if tensors else 0.0)
