from dataclasses import dataclass

from t3d.components import setting
from t3d.decoding.policy import STOP, Policy, best, register


@register("eos_rejection")
@dataclass(frozen=True)
class EOSRejection(Policy):
    """The `k_s` most confident; a token that ends the response counts less the earlier the step (arXiv 2509.23924).

    At step i of S its confidence is multiplied by `eos_floor + (1 - eos_floor) * i / (S - 1)`, so the last step is as
    without it. It changes when a token is committed, not which token that is.
    """

    needs = frozenset({STOP})
    scheduled = True
    eos_floor: float = setting(0.4, "factor at the first step of a stop token's confidence", low=0, high=1)

    def decide(self, view, knobs, memory):
        last = (view.steps - 1)[:, None]
        share = view.step[:, None].minimum(last) / last.clamp(min=1)
        share = share.masked_fill(last == 0, 1.0)  # a single step is the last
        factor = knobs.eos_floor + (1 - knobs.eos_floor) * share
        return best((view.confidence * factor).where(view.stop, view.confidence), view.quota)
