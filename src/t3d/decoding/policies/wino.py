from dataclasses import dataclass
from typing import ClassVar

import torch

from t3d.components import setting
from t3d.decoding.policy import SHADOW, Decision, Memory, Policy, at_least_one, best, register


@register("wino")
@dataclass(frozen=True)
class WINO(Policy):
    """Commits freely and takes back: wide in, narrow out (WINO, arXiv 2507.18578).

    Of `m` masks those above `accept_threshold` are committed, at most the `min(max(.7 m, 5), 20)` most confident.
    Filled tokens whose probability, where all but themselves is seen, is below `revoke_threshold` become masks again:
    the least probable ones, fewer than this step commits and fewer than the step before did.
    """

    needs = frozenset({SHADOW})
    memory: ClassVar = {"accepted": Memory(dtype=torch.int64, fill=30)}
    accept_threshold: float = setting(
        0.6, "commit above this confidence (wino)", low=0, high=1, slow=1.0, fast=0.0, values=(0.9, 0.8, 0.7, 0.6, 0.5)
    )
    revoke_threshold: float = setting(0.9, "mask a filled token again below this probability (wino)", low=0, high=1)

    def decide(self, view, knobs, memory):
        cap = (view.masked.sum(-1) * 7 // 10).clamp(5, 20)
        commit = at_least_one(
            view.masked & (view.confidence > knobs.accept_threshold) & best(view.confidence, cap), view
        )
        accepted, before = commit.sum(-1), memory["accepted"][:, 0]
        most = accepted.minimum(before) - 1
        remask = (view.shadow < knobs.revoke_threshold) & best(-view.shadow, most)
        memory["accepted"][:, 0] = accepted.where(accepted > 0, before)
        return Decision(commit, remask=remask)
