from dataclasses import dataclass
from typing import ClassVar

from t3d.components import setting
from t3d.decoding.policy import Memory, Policy, at_least_one, register


@register("credit")
@dataclass(frozen=True)
class Credit(Policy):
    """All above the threshold, after a bonus for tokens that were likeliest before (dInfer's credit decoder).

    At each step a place's credits are multiplied by `credit_decay`, its likeliest token gains `p ** credit_power`, and
    logits grow by `credit_weight * log(credit + 1)`. Remembers a number per place and token: 4 bytes x vocabulary.
    """

    memory: ClassVar = {"credit": Memory("vocabulary")}
    threshold: float = setting(
        0.9, "commit above this confidence", low=0, high=1, slow=1.0, fast=0.0, values=(0.99, 0.95, 0.9, 0.8, 0.7)
    )
    credit_weight: float = setting(0.7, "how much credit raises a logit", low=0)
    credit_decay: float = setting(0.8, "share of its credit that a token keeps at each step", low=0, high=1)
    credit_power: float = setting(0.2, "power of the likeliest token's probability that it gains as credit", low=0)

    @classmethod
    def adjust(cls, logits, knobs, memory):
        p, token = logits.softmax(-1).max(-1, keepdim=True)
        credit = memory["credit"].mul_(knobs.credit_decay).scatter_add_(-1, token, p**knobs.credit_power)
        return logits + knobs.credit_weight * credit.log1p()

    def decide(self, view, knobs, memory):
        return at_least_one(view.masked & (view.confidence > knobs.threshold), view)
