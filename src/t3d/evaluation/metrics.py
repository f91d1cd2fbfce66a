"""The numbers an evaluation reports, as functions of counts and lists (docs/evaluation.md defines them)."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from t3d.trajectories.record import Trajectory

Z95 = 1.959963984540054  # the normal distribution's 97.5th percentile


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion; (0, 1) for `n` = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # where the interval touches an end it does so exactly, which rounding would miss
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bootstrap(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` (one per problem), resampling problems."""
    if len(values) == 0:
        return 0.0, 1.0
    rng = np.random.default_rng(seed)
    data = np.asarray(values, float)
    rows = max(1, 2**20 // len(data))  # at a time, which bounds the memory
    counts = [min(rows, resamples - done) for done in range(0, resamples, rows)]
    means = np.concatenate([data[rng.integers(len(data), size=(count, len(data)))].mean(1) for count in counts])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def tokps(block_size: int, steps: int) -> float:
    """Nominal tokens per denoising step, B / S."""
    return block_size / steps


@dataclass
class Speed:
    """Totals over sequences; `tokens` are the generated ones through each first stop token, counted from ids."""

    sequences: int = 0
    tokens: int = 0
    prefill: int = 0
    denoise: int = 0
    commit: int = 0
    verify: int = 0

    def add(self, t: Trajectory) -> None:
        self.sequences += 1
        self.tokens += t.length
        self.prefill += t.nfe.prefill
        self.denoise += t.nfe.denoise
        self.commit += t.nfe.commit
        self.verify += t.nfe.verify

    @property
    def forwards(self) -> int:
        return self.prefill + self.denoise + self.commit + self.verify

    @property
    def tpf(self) -> float:
        """Tokens per forward, over the forwards that predict: those that denoise or verify."""
        return self.tokens / max(1, self.denoise + self.verify)

    @property
    def tpf_all(self) -> float:
        """Tokens per forward, over all forwards: prefill and commit too."""
        return self.tokens / max(1, self.forwards)

    @property
    def nfe(self) -> float:
        """Forwards per sequence."""
        return self.forwards / max(1, self.sequences)


def aup(points: Iterable[tuple[float, float]], best: float | None = None) -> float:
    """Accuracy Under Parallelism of one method's points (rho = TPF, y = accuracy in percent).

    best: the highest accuracy, in percent, of any method that is compared; default: of these points.
    Points more than 5 percent below the one of lowest rho are left out. 0 without points.
    """
    ordered = sorted(points)
    if not ordered:
        return 0.0
    best = max(y for _, y in ordered) if best is None else best

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / best)), 1.0) if best > 0 else 0.0

    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - 5]
    area = kept[0][0] * kept[0][1]
    for (rho0, y0), (rho1, y1) in pairwise(kept):
        area += (rho1 - rho0) * (weighted(y1) + weighted(y0)) / 2
    return area


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of `k` samples, drawn from `n` of which `correct` are right, is right.

    The unbiased estimator of arXiv 2107.03374; needs k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[Hashable], correct: Sequence[bool]) -> bool:
    """Whether the most frequent answer is right; of equally frequent ones the first given counts. No answer is None."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner = max(votes, key=votes.__getitem__)
    return bool(correct[answers.index(winner)])


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of McNemar's test: problems that only one of two methods solves are split 1:1."""
    n = only_a + only_b
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one matches or beats in both coordinates, by rising first coordinate."""
    front, best = [], -math.inf
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1])):
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front[::-1]
