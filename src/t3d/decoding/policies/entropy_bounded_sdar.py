from dataclasses import dataclass

from t3d.components import setting
from t3d.decoding.policy import ENTROPY, Policy, register, sorted_entropy


@register("entropy_bounded_sdar")
@dataclass(frozen=True)
class EntropyBoundedSDAR(Policy):
    """As many of the lowest entropy as keep their sum below the bound, the last one counted (SDAR's samplers)."""

    needs = frozenset({ENTROPY})
    entropy_bound: float = setting(
        0.35, "nats that a step may commit", low=0, slow=0.0, fast=20.0, values=(0.05, 0.1, 0.2, 0.35, 0.7)
    )

    def decide(self, view, knobs, memory):
        _, total = sorted_entropy(view)
        return total < knobs.entropy_bound
