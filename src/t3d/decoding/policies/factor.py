from dataclasses import dataclass

from t3d.components import setting
from t3d.decoding.policy import Policy, rank, register


@register("factor")
@dataclass(frozen=True)
class Factor(Policy):
    """The most confident `n`, for the largest `n` with `(n + 1) * (1 - c_(n)) < factor` (Fast-dLLM, arXiv 2505.22618).

    `c_(n)` is the n-th highest confidence; both factors grow with n, so each place can be asked by itself.
    """

    factor: float = setting(
        1.0, "the bound f of Fast-dLLM's rule", low=0, slow=0.0, fast=64.0, values=(0.1, 0.25, 0.5, 1.0, 2.0)
    )

    def decide(self, view, knobs, memory):
        n = rank(view.confidence) + 1
        return (n + 1) * (1 - view.confidence) < knobs.factor
