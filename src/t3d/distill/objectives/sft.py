"""`sft`: block-diffusion cross-entropy on given responses, random masks (BD3-LM, arXiv 2503.09573)."""

import numpy as np
from torch import Tensor

from t3d.distill.config import T3DConfig
from t3d.distill.data import TrainingBatch
from t3d.distill.logprobs import token_logprobs
from t3d.distill.objectives.base import Forward, Objective, mean, segments
from t3d.distill.states import uniform_mask


class SFT(Objective):
    """`L = mean over blocks of (1/|M|) * sum_{i in M} -log p(x_i | state)`, `|M|` uniform in 1..n in every block.

    Trains a teacher from scratch, or adapts an autoregressive model to block diffusion.
    """

    unit = "block"

    def state(self, block, rank, rng: np.random.Generator, config: T3DConfig):
        return uniform_mask(block, rng)

    def random_ratio(self, config: T3DConfig) -> float:
        return 0.0

    def loss(self, batch: TrainingBatch, student: Forward, reference, config: T3DConfig, mask_id: int):
        logp: Tensor = student(lambda h, w: token_logprobs(h, w, batch.target[:, None], mask_id))[:, 0]
        loss = -(logp * batch.weight).sum() / max(segments(batch.block), 1)
        return loss, {"loss/ce": loss.detach(), "lp/real": mean(logp.detach())}
