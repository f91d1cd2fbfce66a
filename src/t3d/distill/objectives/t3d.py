"""`t3d`: Direct Discriminative Optimization plus path consistency (T3D, arXiv 2602.12262; DDO, arXiv 2503.01103)."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from t3d.distill.config import T3DConfig
from t3d.distill.data import TrainingBatch
from t3d.distill.logprobs import compare_tokens, token_logprobs
from t3d.distill.objectives.base import Forward, Objective, mean, segment_mean, segment_sum, segments


class DDO(Objective):
    """DDO alone, from one student and one reference forward on the same states.

    Real tokens are the trajectory's, fake ones the reference's own choice at the same positions; `lp` is the mean (or
    sum) of log p over the masked positions of a sequence (or block):

        L_DDO = -logsigmoid(beta * (lp_s(real) - lp_r(real))) - alpha * logsigmoid(-beta * (lp_s(fake) - lp_r(fake)))
    """

    needs_reference = True
    lasting_reference = True
    unit = "sequence"
    round_interval = 10

    def loss(self, batch: TrainingBatch, student: Forward, reference: Forward, config: T3DConfig, mask_id: int):
        def reference_head(hidden, weight):
            return compare_tokens(hidden, weight, batch.target, mask_id, config.reference_temperature)

        tokens, reference_logp = reference(reference_head)
        logp: Tensor = student(lambda h, w: token_logprobs(h, w, tokens, mask_id))  # (m, 2)
        ddo, metrics = ddo_loss(logp, reference_logp, batch, config)
        metrics["fake_differs"] = mean((tokens[:, 0] != tokens[:, 1]).float())
        return self.combine(ddo, logp[:, 0], batch, config, metrics)

    def combine(self, ddo: Tensor, real: Tensor, batch: TrainingBatch, config: T3DConfig, metrics: dict):
        return ddo, metrics | {"loss/ddo": ddo.detach()}


class T3D(DDO):
    """`L = L_DDO + lambda * L_path`, with

    L_path = mean over levels l = 1..ceil(B/k) of the mean cross-entropy over tokens with commit rank < l * k
    """

    def combine(self, ddo: Tensor, real: Tensor, batch: TrainingBatch, config: T3DConfig, metrics: dict):
        path = path_loss(real, batch, config.path_k)
        return ddo + config.path_lambda * path, metrics | {"loss/ddo": ddo.detach(), "loss/path": path.detach()}


def ddo_loss(logp: Tensor, reference_logp: Tensor, batch: TrainingBatch, config: T3DConfig):
    """DDO on `(m, 2)` log-probabilities of (real, fake) tokens; `(scalar, metrics)`."""
    segment = batch.sequence if config.ddo_unit == "sequence" else batch.block
    combine = segment_mean if config.ddo_reduction == "mean" else segment_sum
    real = combine(logp[:, 0] - reference_logp[:, 0], segment)
    fake = combine(logp[:, 1] - reference_logp[:, 1], segment)
    loss = -mean(logsigmoid(config.beta * real)) - config.alpha * mean(logsigmoid(-config.beta * fake))
    metrics = {
        "lp/real": mean(logp[:, 0].detach()),
        "lp/fake": mean(logp[:, 1].detach()),
        "lp/reference_real": mean(reference_logp[:, 0]),
        "lp/reference_fake": mean(reference_logp[:, 1]),
        "margin/real": mean(real.detach()),
        "margin/fake": mean(fake.detach()),
    }
    return loss, metrics


def path_loss(logp: Tensor, batch: TrainingBatch, k: int) -> Tensor:
    """L_path in closed form: cross-entropy weighted by `path_weights`, averaged over sequences."""
    weights = path_weights(batch.rank, batch.sequence, batch.block_size, k)
    return -(weights * logp).sum() / max(segments(batch.sequence), 1)


def path_weights(rank: Tensor, sequence: Tensor, block_size: int, k: int) -> Tensor:
    """`w(rank) = 1/L * sum over the levels containing it of 1/N_l`, `(m,)`; `N_l`: a sequence's tokens in level l.

    A level without tokens in a sequence adds nothing.
    """
    levels = -(-block_size // k)
    weights = torch.zeros_like(rank, dtype=torch.float32)
    for level in range(1, levels + 1):
        inside = (rank < level * k).float()
        count = segment_sum(inside, sequence)[sequence]
        weights = weights + inside / count.clamp(min=1)
    return weights / levels
