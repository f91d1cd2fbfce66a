from dataclasses import dataclass

from t3d.components import setting
from t3d.decoding.policy import ENTROPY, Policy, best, register


@register("entropy_threshold")
@dataclass(frozen=True)
class EntropyThreshold(Policy):
    """All whose own entropy is below the bound, and at least the least uncertain (d3LLM)."""

    needs = frozenset({ENTROPY})
    entropy_threshold: float = setting(
        0.4, "commit below this entropy in nats", low=0, slow=0.0, fast=20.0, values=(0.1, 0.2, 0.4, 0.8, 1.6)
    )

    def decide(self, view, knobs, memory):
        return (view.entropy < knobs.entropy_threshold) | best(-view.entropy, view.must.long())
