from dataclasses import dataclass

from t3d.decoding.policy import Policy, best, register


@register("low_confidence_static")
@dataclass(frozen=True)
class LowConfidenceStatic(Policy):
    """The `k_s` most confident (low-confidence remasking of LLaDA, arXiv 2502.09992, and SDAR, arXiv 2510.06303)."""

    scheduled = True

    def decide(self, view, knobs, memory):
        return best(view.confidence, view.quota)
