"""`soft`: divergence to the reference's distribution (classic logit distillation)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from t3d.components import setting
from t3d.distill.batch import TrainingBatch, when_committed
from t3d.distill.logprobs import WHOLE_CHUNK, in_chunks, mask_free_logits
from t3d.distill.objective import AnyStates, Ask, OnPolicy, Privileged, mean, register


@register("soft")
@dataclass(frozen=True)
class Soft(AnyStates, Privileged, OnPolicy):
    """Mean over masked positions of a divergence between student q and reference p (Hinton et al., arXiv 1503.02531).

    `soft_divergence`: "forward" KL(p || q), "reverse" KL(q || p), or "js", half of each to their mean. With
    `soft_top_k`, both are first restricted to the reference's k likeliest tokens and renormalised.
    `soft_state`: "committed" takes p at the state in which the trajectory committed the token, so that few steps learn
    from many; "same" at the student's own state, which teaches nothing where the student starts as the reference.
    """

    beyond_length = True  # no label is needed, and the states of commitment show what stands behind the stop, too

    soft_divergence: str = setting("forward", "divergence to the reference", choices=("forward", "reverse", "js"))
    soft_state: str = setting(
        "committed",
        "the state at which the reference is asked, 'committed' (the token's own) or 'same' (the student's)",
        choices=("committed", "same"),
    )
    soft_top_k: int = setting(0, "compare only the reference's k likeliest tokens; 0: all", low=0)

    def loss(self, batch: TrainingBatch, ask: Ask):
        asked = ()
        if self.soft_state == "committed":
            asked = (when_committed(batch, torch.ones_like(batch.part, dtype=torch.bool), ask.mask_id),)
        other = ask.reference(lambda h, w: (h, w), *asked)
        settings = (ask.mask_id, self.soft_divergence, self.soft_top_k)
        loss = mean(ask.student(lambda h, w: divergence(h, w, *other, *settings)), batch.weight)
        return loss, {f"loss/{self.soft_divergence}": loss.detach()}


def divergence(
    hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, mask_id: int, kind: str = "forward", k: int = 0
) -> Tensor:
    """Divergence between the models' distributions at each position, `(m,)`, from hidden states and head weights.

    hidden, weight give the student's q; other, other_weight the reference's p.
    """
    return in_chunks(
        lambda h, o: _divergence(h, weight, o, other_weight, mask_id, kind, k), hidden, other, chunk=WHOLE_CHUNK
    )


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
