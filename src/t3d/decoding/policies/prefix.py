from dataclasses import dataclass

from t3d.components import setting
from t3d.decoding.policy import Policy, register


@register("prefix")
@dataclass(frozen=True)
class Prefix(Policy):
    """From the left, the masks up to the first that is not above the threshold; at least the leftmost (SDLM)."""

    threshold: float = setting(
        0.9, "commit above this confidence", low=0, high=1, slow=1.0, fast=0.0, values=(0.99, 0.95, 0.9, 0.8, 0.7)
    )

    def decide(self, view, knobs, memory):
        doubtful = view.masked & (view.confidence <= knobs.threshold)
        leftmost = (view.masked.cumsum(-1) == 1) & view.must[:, None]
        return view.masked & ((doubtful.cumsum(-1) == 0) | leftmost)
