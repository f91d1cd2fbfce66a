"""`sft`: block-diffusion cross-entropy on given responses, random masks (BD3-LM, arXiv 2503.09573)."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from t3d.distill.batch import TrainingBatch
from t3d.distill.logprobs import token_logprobs
from t3d.distill.objective import SOLUTIONS, Ask, Objective, mean, register, segments
from t3d.distill.states import Response, State, uniform_mask


@register("sft")
@dataclass(frozen=True)
class SFT(Objective):
    """`L = mean over blocks of (1/|M|) * sum_{i in M} -log p(x_i | state)`, `|M|` uniform in 1..n in every block.

    Trains a teacher from scratch, or adapts an autoregressive model to block diffusion.
    """

    source = SOLUTIONS
    unit = "block"

    def states(self, response: Response, rng: np.random.Generator, progress: float = 1.0):
        return [State(*uniform_mask(response.block, rng)) for _ in range(self.states_per_sequence)]

    def loss(self, batch: TrainingBatch, ask: Ask):
        logp: Tensor = ask.student(lambda h, w: token_logprobs(h, w, batch.target[:, None], ask.mask_id))[:, 0]
        loss = -(logp * batch.weight).sum() / max(segments(batch.block), 1)
        return loss, {"loss/ce": loss.detach(), "lp/real": mean(logp.detach())}
