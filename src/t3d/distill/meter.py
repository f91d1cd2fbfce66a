"""What is logged of a training: means over micro-batches and processes, speed and memory."""

import re
import resource
import sys
import time
from collections import defaultdict
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from t3d.distill.batch import TrainingBatch
from t3d.distill.logprobs import choose_tokens
from t3d.trajectories import Trajectory

# FLOP/s of products of dense bfloat16 matrices with float32 sums, from the makers' data sheets. The key is the device's
# name without what many have in it.
PEAK = {
    "gb200": 2500e12,
    "b200": 2250e12,
    "gh200": 989e12,
    "h200": 989e12,
    "h200 nvl": 835e12,
    "h100": 989e12,
    "h100 nvl": 835e12,
    "h100 pcie": 756e12,
    "a100": 312e12,
    "a100 pcie": 312e12,
    "a40": 149.7e12,
    "a30": 165e12,
    "a10": 125e12,
    "l40s": 362e12,
    "l40": 181e12,
    "l4": 121e12,
    "rtx 6000 ada generation": 364.2e12,
    "rtx a6000": 154.8e12,
    "rtx 5090": 209.5e12,
    "rtx 4090": 165.2e12,
    "rtx 3090": 71e12,
}
_COMMON = re.compile(r"nvidia|geforce|sxm\d?|hbm\w*|\d+gb")


def peak_flops(device: str) -> float | None:
    """FLOP/s that the GPU of this name reaches at most in bfloat16, as its maker says; None for a name not in PEAK.

    A part of a GPU (MIG) and a laptop's have names of their own, and are not known.
    """
    words = re.findall(r"[^\W_]+", device.lower())
    return PEAK.get(" ".join(word for word in words if not _COMMON.fullmatch(word)))


def utilisation(operations: float, seconds: float, peak: float) -> float:
    """The share of its peak, in FLOP/s, that a device did in these seconds: model FLOPs utilisation, or MFU."""
    return operations / seconds / peak


class Meter:
    """Sums and counts by name, since the last log. They stay on the device until then, so that a step does not wait.

    peak: FLOP/s of this process's device, for `mfu`; without one it is left out.
    """

    def __init__(self, accelerator: Accelerator, peak: float | None = None):
        self._accelerator, self.peak = accelerator, peak
        self._sums: dict[str, list[Tensor | float]] = defaultdict(list)
        self._counts: dict[str, list[Tensor | float]] = defaultdict(list)
        self._since: float | None = None
        self._tokens = 0  # in batches, since the last log
        self._forwarded = 0  # through any model, in the last micro-batch
        self._operations = 0.0  # since the last log

    def start(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    @contextmanager
    def paused(self):
        """Inside, time does not count."""
        start = time.monotonic()
        yield
        if self._since is not None:
            self._since += time.monotonic() - start

    def add(self, name: str, mean: Tensor | float, count: Tensor | float = 1.0) -> None:
        total = mean * count
        self._sums[name].append(total.detach() if isinstance(total, Tensor) else total)
        self._counts[name].append(count.detach() if isinstance(count, Tensor) else count)

    def seen(self, tokens: int) -> None:
        self._tokens += tokens

    def answered(self, answers: list[tuple[Trajectory, float, float]]) -> None:
        """Note the student's own answers, each with its reward and advantage."""
        count = len(answers)
        tokens, forwards = (sum(f(t) for t, *_ in answers) for f in (lambda t: t.length, lambda t: t.nfe.predicting))
        self.add("answers/reward", sum(reward for _, reward, _ in answers) / count, count)
        self.add("answers/spread", sum(gain != 0 for *_, gain in answers) / count, count)
        self.add("answers/tokens", tokens / count, count)
        self.add("answers/tpf", tokens / forwards, forwards)

    def forwarded(self, tokens: int) -> None:
        """Tokens went through a model; a backward pass counts as two forwards."""
        self._forwarded += tokens

    def operations(self, parameters: int) -> float:
        """Of the last micro-batch: 2 per weight and token."""
        tokens, self._forwarded = self._forwarded, 0
        self._operations += 2.0 * tokens * parameters
        return 2.0 * tokens * parameters

    def watched(self, head, batch: TrainingBatch, mask_id: int):
        """The head, noting too how often the student's own choice is the trajectory's token, by commit rank."""

        def watched(hidden: Tensor, weight: Tensor):
            with torch.no_grad():
                right = (choose_tokens(hidden.detach(), weight.detach(), mask_id) == batch.target).float()
                hits, every = (
                    torch.zeros(batch.block_size, device=right.device).index_add(0, batch.rank, x)
                    for x in (right, torch.ones_like(right))
                )
            for rank in range(batch.block_size):
                self.add(f"accuracy/rank_{rank}", hits[rank] / every[rank].clamp(min=1), every[rank])
            return head(hidden, weight)

        return watched

    def drain(self) -> dict[str, float]:
        """The means over all processes since the last time; every process must call it."""
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        self.add("tokens_per_second", self._tokens / seconds * self._accelerator.num_processes)
        self.add("memory_gb", peak_memory(self._accelerator.device) / 1e9)
        if self.peak:
            self.add("mfu", utilisation(self._operations, seconds, self.peak))
        self._tokens, self._operations = 0, 0.0
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


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated so far on this process's GPU, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
