from dataclasses import dataclass

from t3d.components import setting
from t3d.decoding.policy import Policy, best, register


@register("low_confidence_dynamic")
@dataclass(frozen=True)
class LowConfidenceDynamic(Policy):
    """All with confidence above the threshold, and at least `floor` of the most confident (Fast-dLLM, SDAR)."""

    threshold: float = setting(
        0.9, "commit above this confidence", low=0, high=1, slow=1.0, fast=0.0, values=(0.99, 0.95, 0.9, 0.8, 0.7)
    )
    floor: str = setting(
        "one", "fewest tokens a step commits: 'one', or 'schedule' for k_s", choices=("one", "schedule")
    )

    @property
    def uses_steps(self):
        return self.floor == "schedule"

    def decide(self, view, knobs, memory):
        count = view.quota.where(knobs.floor[:, 0] == 1, view.quota.clamp(max=1).where(view.must, 0))
        return (view.confidence > knobs.threshold) | best(view.confidence, count)
