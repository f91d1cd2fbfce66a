"""`alpha`: cross-entropy that gives up blocks unlikely as a whole (AlphaDLM, Gushchin, Baranchuk and Korotin, 2026)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from t3d.components import setting
from t3d.distill.batch import TrainingBatch
from t3d.distill.logprobs import token_logprobs
from t3d.distill.objective import AnyStates, Ask, mean, other_default, register, segment_mean


@register("alpha")
@dataclass(frozen=True)
class Alpha(AnyStates):
    """`L = mean over blocks of (1 - exp(k * s)) / k`, s the mean log p (nats) of the block's masked tokens.

    Its gradient is that of the cross-entropy, `-s`, times `exp(k * s)`: a block whose tokens are unlikely together
    counts little, so a factorised prediction may settle on one mode. k = 0 is the cross-entropy. No teacher is needed
    but for the trajectories; the authors train on data, with random masks, which are the default here too.
    """

    unit = "block"

    state: str = other_default(AnyStates, "state", "uniform")
    random_ratio: float = other_default(AnyStates, "random_ratio", 0.0)
    alpha_k: float = setting(1.0, "how much less unlikely blocks count; 0: cross-entropy", low=0)

    def loss(self, batch: TrainingBatch, ask: Ask):
        logp: Tensor = ask.student(lambda h, w: token_logprobs(h, w, batch.target[:, None], ask.mask_id))[:, 0]
        score = segment_mean(logp, batch.block, batch.weight)  # (blocks,)
        k = self.alpha_k
        loss = mean(-torch.expm1(k * score) / k if k else -score)
        return loss, {"loss/alpha": loss.detach(), "lp/real": mean(logp.detach())}
