"""What is logged of a training: means over micro-batches and processes, speed and memory."""

import resource
import sys
import time
from collections import defaultdict

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from t3d.distill.batch import TrainingBatch
from t3d.distill.logprobs import choose_tokens
from t3d.trajectories import Trajectory

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}  # dense bf16 FLOP/s of a GPU


class Meter:
    """Sums and counts by name, since the last log. They stay on the device until then, so that a step does not wait."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._sums: dict[str, list[Tensor | float]] = defaultdict(list)
        self._counts: dict[str, list[Tensor | float]] = defaultdict(list)
        self._since: float | None = None
        self._tokens = 0  # in batches, since the last log
        self._forwarded = 0  # through any model, in the last micro-batch
        self._operations = 0.0  # since the last log

    def start(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def restart(self) -> None:
        """Leave out the time since the last log."""
        self._since = time.monotonic()

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
        self.add("memory_gb", _peak_memory() / 1e9)
        peak = _peak_operations()
        if peak:
            self.add("mfu", self._operations / seconds / peak)
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


def _peak_memory() -> int:
    """Bytes: the most allocated so far on this process's GPU, else by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_operations() -> float | None:
    """FLOP/s of this process's GPU in bfloat16, as its maker says; None where there is none that is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK.items() if known in name), None)
