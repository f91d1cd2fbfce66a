"""`soft`: divergence to the reference's distribution at the trajectory's states (classic logit distillation)."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t3d.distill.config import T3DConfig
from t3d.distill.data import TrainingBatch
from t3d.distill.logprobs import CHUNK, mask_free_logits
from t3d.distill.objectives.base import Forward, Objective


class Soft(Objective):
    """Mean over masked positions of a divergence between student q and reference p (Hinton et al., arXiv 1503.02531).

    `soft_divergence`: "forward" KL(p || q), "reverse" KL(q || p), or "js", half of each to their mean. With
    `soft_top_k`, both are first restricted to the reference's k likeliest tokens and renormalised.
    """

    needs_reference = True

    def loss(self, batch: TrainingBatch, student: Forward, reference: Forward, config: T3DConfig, mask_id: int):
        hidden, weight = student(lambda h, w: (h, w))
        other, other_weight = reference(lambda h, w: (h, w))
        settings = (mask_id, config.soft_divergence, config.soft_top_k)
        parts = [
            checkpoint(_divergence, h, weight, r, other_weight, *settings, use_reentrant=False)
            for h, r in zip(hidden.split(CHUNK), other.split(CHUNK), strict=True)
        ]
        loss = torch.cat(parts).mean()
        return loss, {f"loss/{config.soft_divergence}": loss.detach()}


def _divergence(hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, mask_id: int, kind: str, k: int):
    """`(m,)` divergences over the vocabulary without the mask token."""
    logq = mask_free_logits(hidden, weight, mask_id)
    logp = mask_free_logits(other, other_weight, mask_id)
    if k:
        logp, kept = logp.topk(min(k, logp.shape[-1] - 1))
        logq = logq.gather(-1, kept)
    logq, logp = (x.log_softmax(-1).clamp(min=-1e4) for x in (logq, logp))  # finite, so that 0 * log 0 is 0
    if kind == "forward":
        return kl(logp, logq)
    if kind == "reverse":
        return kl(logq, logp)
    middle = torch.logaddexp(logp, logq) - torch.log(torch.tensor(2.0))
    return (kl(logp, middle) + kl(logq, middle)) / 2


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, from log-probabilities."""
    return (logp.exp() * (logp - logq)).sum(-1)
