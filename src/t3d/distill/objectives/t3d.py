"""`t3d`: Direct Discriminative Optimization plus path consistency (T3D, arXiv 2602.12262; DDO, arXiv 2503.01103)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from t3d.components import setting
from t3d.distill.batch import TrainingBatch
from t3d.distill.logprobs import compare_tokens, token_logprobs
from t3d.distill.objective import (
    AnyStates,
    Ask,
    Objective,
    Referenced,
    mean,
    other_default,
    register,
    segment_mean,
    segment_sum,
    segments,
)


@dataclass(frozen=True)
class PathLevels(Objective):
    """Part: the levels of path consistency."""

    path_k: int = setting(4, "path levels are tokens committed among the first k, 2k, 3k, ... of their block", low=1)


@register("ddo")
@dataclass(frozen=True)
class DDO(AnyStates, Referenced):
    """DDO alone, from one student and one reference forward on the same states.

    Real tokens are the trajectory's, fake ones the reference's own choice at the same positions; `lp` is the mean (or
    sum) of log p over the masked positions of a sequence (or block):

        L_DDO = -logsigmoid(beta * (lp_s(real) - lp_r(real))) - alpha * logsigmoid(-beta * (lp_s(fake) - lp_r(fake)))
    """

    lasting_reference = True
    unit = "sequence"

    round_interval: int = other_default(Referenced, "round_interval", 10)
    alpha: float = setting(0.5, "weight of DDO's term on the reference's own choices")
    beta: float = setting(0.1, "scale of the log-likelihood margins in DDO")
    ddo_unit: str = setting("sequence", "what one DDO margin is taken over", choices=("sequence", "block"))
    ddo_reduction: str = setting("mean", "how log-likelihoods combine in a margin", choices=("mean", "sum"))
    reference_temperature: float = setting(
        0.0, "fake tokens are the reference's samples at this temperature; 0: its argmax", low=0
    )
    reference_cache: str | None = setting(
        None,
        "with round_interval=0: a folder for what the reference says of each micro-batch; runs with the same states, "
        "e.g. with another beta or learning rate, read it there",
    )

    def loss(self, batch: TrainingBatch, ask: Ask):
        def reference_head(hidden, weight):
            return compare_tokens(hidden, weight, batch.target, ask.mask_id, self.reference_temperature)

        tokens, reference_logp = ask.reference(reference_head)
        logp: Tensor = ask.student(lambda h, w: token_logprobs(h, w, tokens, ask.mask_id))  # (m, 2)
        ddo, metrics = self.ddo(logp, reference_logp, batch)
        metrics["fake_differs"] = mean((tokens[:, 0] != tokens[:, 1]).float())
        return self.combine(ddo, logp[:, 0], batch, metrics)

    def combine(self, ddo: Tensor, real: Tensor, batch: TrainingBatch, metrics: dict):
        return ddo, metrics | {"loss/ddo": ddo.detach()}

    def ddo(self, logp: Tensor, reference_logp: Tensor, batch: TrainingBatch):
        """DDO on `(m, 2)` log-probabilities of (real, fake) tokens; `(scalar, metrics)`."""
        segment = batch.sequence if self.ddo_unit == "sequence" else batch.block
        margins = (logp - reference_logp).unbind(1)
        if self.ddo_reduction == "mean":
            real, fake = (segment_mean(margin, segment, batch.weight) for margin in margins)
        else:
            real, fake = (segment_sum(margin * batch.weight, segment) for margin in margins)
        loss = -mean(logsigmoid(self.beta * real)) - self.alpha * mean(logsigmoid(-self.beta * fake))
        metrics = {
            "lp/real": mean(logp[:, 0].detach()),
            "lp/fake": mean(logp[:, 1].detach()),
            "lp/reference_real": mean(reference_logp[:, 0]),
            "lp/reference_fake": mean(reference_logp[:, 1]),
            "margin/real": mean(real.detach()),
            "margin/fake": mean(fake.detach()),
        }
        return loss, metrics


@register("t3d")
@dataclass(frozen=True)
class T3D(DDO, PathLevels):
    """`L = L_DDO + lambda * L_path`, with

    L_path = mean over levels l = 1..ceil(B/k) of the mean cross-entropy over tokens with commit rank < l * k
    """

    path_lambda: float = setting(0.2, "weight of the path-consistency loss")

    def combine(self, ddo: Tensor, real: Tensor, batch: TrainingBatch, metrics: dict):
        path = path_loss(real, batch, self.path_k)
        return ddo + self.path_lambda * path, metrics | {"loss/ddo": ddo.detach(), "loss/path": path.detach()}


def path_loss(logp: Tensor, batch: TrainingBatch, k: int) -> Tensor:
    """L_path in closed form: cross-entropy weighted by `path_weights`, averaged over sequences."""
    weights = path_weights(batch.rank, batch.sequence, batch.block_size, k, batch.weight)
    return -(weights * logp).sum() / max(segments(batch.sequence), 1)


def path_weights(rank: Tensor, sequence: Tensor, block_size: int, k: int, weight: Tensor | None = None) -> Tensor:
    """`w(rank) = 1/L * sum over the levels containing it of 1/N_l`, `(m,)`; `N_l`: a sequence's tokens in level l.

    A level without tokens in a sequence adds nothing. weight `(m,)`: what each token counts by, else 1.
    """
    levels = -(-block_size // k)
    weights = torch.zeros_like(rank, dtype=torch.float32)
    for level in range(1, levels + 1):
        inside = (rank < level * k).float() * (1 if weight is None else weight)
        count = segment_sum(inside, sequence)[sequence]
        weights = weights + inside / count.clamp(min=1e-9)
    return weights / levels
