from dataclasses import dataclass

from t3d.components import setting
from t3d.decoding.policy import ENTROPY, Policy, register, sorted_entropy


@register("entropy_bounded_eb")
@dataclass(frozen=True)
class EntropyBoundedEB(Policy):
    """As many of the lowest entropy as keep sum minus maximum within the bound (EB-Sampler, arXiv 2505.24857).

    Sorted by entropy the maximum is the last, so it is not counted: one token more than SDAR's rule, as a rule.
    """

    needs = frozenset({ENTROPY})
    entropy_bound: float = setting(
        0.35, "nats that a step may commit", low=0, slow=0.0, fast=20.0, values=(0.05, 0.1, 0.2, 0.35, 0.7)
    )

    def decide(self, view, knobs, memory):
        _, total = sorted_entropy(view)
        return view.masked & (total - view.entropy.masked_fill(~view.masked, 0.0) <= knobs.entropy_bound)
