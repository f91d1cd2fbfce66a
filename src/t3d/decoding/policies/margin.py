from dataclasses import dataclass

from t3d.decoding.policy import MARGIN, Policy, best, register


@register("margin")
@dataclass(frozen=True)
class Margin(Policy):
    """The `k_s` whose likeliest token leads the second by most (Dream's topk_margin, arXiv 2508.15487)."""

    needs = frozenset({MARGIN})
    scheduled = True

    def decide(self, view, knobs, memory):
        return best(view.margin, view.quota)
