from dataclasses import dataclass
from math import inf

from t3d.decoding.policy import UNIFORM, Policy, best, register


@register("random")
@dataclass(frozen=True)
class Random(Policy):
    """`k_s` at random, by the sequence's own seed."""

    needs = frozenset({UNIFORM})
    scheduled = True

    def decide(self, view, knobs, memory):
        return best(view.uniform.masked_fill(~view.masked, -inf), view.quota)
