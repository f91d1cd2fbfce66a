from dataclasses import dataclass
from math import inf

from t3d.components import setting
from t3d.decoding.policy import Policy, best, register


@register("adaptive")
@dataclass(frozen=True)
class Adaptive(Policy):
    """As many steps as the model's own doubt asks for: `r = ceil(expected wrong tokens / risk)`, spread evenly.

    The expected number of wrong tokens, were all committed now, is the sum of `1 - confidence` over the `m` masked
    places. The `ceil(m / r)` most confident are committed, and the next step asks again.
    """

    risk: float = setting(
        0.1,
        "wrong tokens a step may expect; `t3d calibrate` chooses it",
        low=0,
        slow=0.0,
        fast=64.0,
        values=(0.02, 0.05, 0.1, 0.2, 0.4),
    )

    def decide(self, view, knobs, memory):
        left = view.masked.sum(-1)
        doubt = (1 - view.confidence).masked_fill(~view.masked, 0.0).sum(-1)
        steps = (doubt / knobs.risk[:, 0]).nan_to_num(nan=1.0, posinf=inf).ceil()  # 0 / 0: no doubt, one step
        steps = steps.clamp(min=1.0).minimum(left.clamp(min=1).to(steps.dtype)).to(left.dtype)
        return best(view.confidence, -(-left // steps))
