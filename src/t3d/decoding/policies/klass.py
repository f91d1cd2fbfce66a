from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch

from t3d.components import setting
from t3d.decoding.policy import Memory, Policy, best, register


@register("klass")
@dataclass(frozen=True)
class KLASS(Policy):
    """All that are confident and no longer change; where none is, the `k_s` most confident (KLASS, arXiv 2511.05664).

    A place no longer changes if KL(p_t || p_(t-1)) was below `kl_bound` for `stable_steps` steps in a row; its first
    step has nothing to compare with. Remembers one distribution per place: 4 bytes x vocabulary.
    """

    memory: ClassVar = {"last": Memory("vocabulary", fill=inf), "stable": Memory("place", torch.int64)}
    threshold: float = setting(0.9, "commit above this confidence", low=0, high=1)
    kl_bound: float = setting(0.01, "nats by which a stable place changes at most", low=0)
    stable_steps: int = setting(2, "steps in a row that a place is stable before it is committed", low=1)

    @property
    def uses_steps(self):
        return True

    @classmethod
    def adjust(cls, logits, knobs, memory):
        now = logits.log_softmax(-1)
        # a token that is never an answer has probability 0 and adds nothing; with no last distribution KL is -inf
        change = (now.exp() * (now - memory["last"]).masked_fill(now == -inf, 0.0)).sum(-1)
        stable = (change < knobs.kl_bound[:, 0]) & (change > -inf)
        memory["stable"].copy_((memory["stable"] + 1).where(stable, 0))
        memory["last"].copy_(now)
        return logits

    def decide(self, view, knobs, memory):
        ready = view.masked & (view.confidence > knobs.threshold) & (memory["stable"] >= knobs.stable_steps)
        forced = best(view.confidence, view.quota.where(view.must, 0))
        return ready.where(ready.any(-1, keepdim=True), forced)
