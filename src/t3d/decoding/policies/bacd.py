from dataclasses import dataclass
from typing import ClassVar

from t3d.components import setting
from t3d.decoding.policy import Memory, Policy, at_least_one, register


@register("bacd")
@dataclass(frozen=True)
class BACD(Policy):
    """All at or above a threshold that follows the block: bounded adaptive confidence (TDAR, arXiv 2602.09555).

    The threshold is the mean confidence of what the block has committed so far, at first the highest confidence, kept
    between `threshold_low` and `threshold_high`; where the bounds cross, the latter holds.
    """

    memory: ClassVar = {"sum": Memory(), "count": Memory()}
    threshold_high: float = setting(
        0.9, "highest threshold of bacd", low=0, high=1, slow=1.0, fast=0.0, values=(0.98, 0.95, 0.9, 0.8, 0.7)
    )
    threshold_low: float = setting(0.6, "lowest threshold of bacd", low=0, high=1)

    def decide(self, view, knobs, memory):
        total, count = memory["sum"], memory["count"]
        mean = total / count.clamp(min=1)
        follows = mean.where(count > 0, view.confidence.amax(-1, keepdim=True))
        threshold = follows.maximum(knobs.threshold_low).minimum(knobs.threshold_high)
        commit = at_least_one(view.masked & (view.confidence >= threshold), view)
        total += view.confidence.where(commit, 0.0).sum(-1, keepdim=True)
        count += commit.sum(-1, keepdim=True)
        return commit
