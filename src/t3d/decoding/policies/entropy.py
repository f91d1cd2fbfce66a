from dataclasses import dataclass

from t3d.decoding.policy import ENTROPY, Policy, best, register


@register("entropy")
@dataclass(frozen=True)
class Entropy(Policy):
    """The `k_s` of least entropy (Dream's entropy, arXiv 2508.15487)."""

    needs = frozenset({ENTROPY})
    scheduled = True

    def decide(self, view, knobs, memory):
        return best(-view.entropy, view.quota)
