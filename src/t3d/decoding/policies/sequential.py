from dataclasses import dataclass

from t3d.decoding.policy import Policy, register


@register("sequential")
@dataclass(frozen=True)
class Sequential(Policy):
    """The `k_s` leftmost."""

    scheduled = True

    def decide(self, view, knobs, memory):
        return view.masked.cumsum(-1) <= view.quota[:, None]
