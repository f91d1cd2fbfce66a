"""`dmd`: the teacher's distribution minus the student's own, at every noise level of what the student writes.

Distribution matching for images lowers KL(student || teacher) between samples with noise added, whose gradient is the
difference of two scores: the teacher's, and that of a *fake* model which learns the student's samples (DMD2,
arXiv 2405.14867; for the samples of few steps TDM, trajectory distribution matching, arXiv 2503.06674). Here noise is
masking, and a score is the prediction of a masked token.

Let Q be the distribution of the blocks that the student writes, P the teacher's, x ~ Q, and M the tokens masked again.
The loss at a token i in M asks three models: the student, q_i, in the state from which it wrote i (all masked, for a
block written in one step), and f_i of the fake model and p_i of the teacher in the state that shows x but for M:

    l_i = sum_v q_i(v) * stopgrad(log f_i(v) - log p_i(v))

Why. Let V be the tokens shown and i, and Q_V, P_V the distributions of x at V. If the student writes i in its last
step, Q_V(x_V) is a sum, over what stands outside of V, of products that each have one factor q_i(x_i). So the
derivative with respect to q_i is

    d KL(Q_V || P_V) = E_x sum_v dq_i(v) [log Q_V(x_i = v, rest) - log P_V(x_i = v, rest)]
                     = E_x sum_v dq_i(v) [log f_i(v) - log p_i(v)]      if f_i(v) = Q(x_i = v | rest),

rest being what is shown; what does not depend on v drops out, since dq_i sums to 0. Each pair (shown, i) belongs to
one V, so that with m of n tokens masked, m uniform in 1..n, places random and each of the m with weight 1/m,

    E sum_{i in M} dl_i / m = 1/n sum_{k=1..n}  mean over V of k tokens of  d KL(Q_V || P_V) / k.

This is KL per token, averaged over noise levels; k = n is KL to the teacher's joint. For a block written in one step
f_i = q_i, and this identity is that of `mean_field`, whose level is k = n alone. In a block of several steps the
earlier ones also decide what the later ones see; as with soft labels everywhere, that part of the gradient is left out.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from t3d.components import setting
from t3d.distill.batch import TrainingBatch, restate, when_committed
from t3d.distill.logprobs import WHOLE_CHUNK, in_chunks, mask_free_logits, token_logprobs
from t3d.distill.objective import (
    Ask,
    Critical,
    Forward,
    OnPolicy,
    Privileged,
    mean,
    other_default,
    register,
    segment_mean,
)
from t3d.distill.objectives.mean_field import place_in_block
from t3d.distill.states import Response, State
from t3d.errors import T3DError


@register("dmd")
@dataclass(frozen=True)
class DMD(Privileged, OnPolicy, Critical):
    """`L = mean over blocks of mean_{i in M} l_i` on what the student writes, and `dmd_anchor` times the cross-entropy
    to the trajectories, with all of a block masked, in the steps that are not `on_policy_share`'s.

    Both logarithms of l_i are at least `dmd_floor`. Q is the student at `on_policy_temperature`, so that q_i is its
    prediction at that temperature. With `fake_updates` 0 there is no fake model and q_i is f_i, which is exact for
    blocks written in one step.
    """

    beyond_length = True  # the student's block is compared whole, with what stands behind its stop
    unit = "block"

    on_policy_share: float = other_default(OnPolicy, "on_policy_share", 1.0)
    on_policy_temperature: float = other_default(OnPolicy, "on_policy_temperature", 1.0)
    dmd_anchor: float = setting(1.0, "weight of the cross-entropy to the trajectories, in steps with them", low=0)
    dmd_noise: float = setting(1.0, "largest share of a block's tokens that is masked again", above=0, high=1)
    dmd_floor: float = setting(-12.0, "lowest log-probability of teacher and fake model that counts")

    def __post_init__(self):
        if not self.on_policy_temperature:
            raise T3DError("on_policy_temperature=0 has no distribution to match: objective dmd needs it above 0")
        if not self.dmd_anchor and self.on_policy_share < 1:
            raise T3DError("dmd_anchor=0 leaves the steps with trajectories nothing to learn: set on_policy_share=1")

    def states(self, response: Response, rng: np.random.Generator, progress: float = 1.0) -> list[State]:
        return [State(np.ones(len(response.block), dtype=bool)) for _ in range(self.states_per_sequence)]

    def critic_loss(self, batch: TrainingBatch, critic: Forward, mask_id: int) -> Tensor:
        """Masked cross-entropy on the student's samples, `sft`'s."""
        again = masked_again(batch.block, self.dmd_noise)
        shown, target = show_others(batch, again, mask_id), batch.target[again]
        logp = critic(lambda h, w: token_logprobs(h, w, target[:, None], mask_id), shown)[:, 0]
        return mean(segment_mean(-logp, batch.block[again]))

    def loss(self, batch: TrainingBatch, ask: Ask):
        if batch.labelled.any():
            return self._anchor(batch, ask)
        again = masked_again(batch.block, self.dmd_noise)
        shown = show_others(batch, again, ask.mask_id)
        every = torch.ones_like(again)
        hidden, weight = ask.student(lambda h, w: (h, w), when_committed(batch, every, ask.mask_id))
        teacher, teacher_weight = ask.reference(lambda h, w: (h, w), shown)
        if ask.critic is None:
            fake, fake_weight, heat = hidden[again].detach(), weight.detach(), self.on_policy_temperature
        else:
            (fake, fake_weight), heat = ask.critic(lambda h, w: (h, w), shown), 1.0

        def terms(h: Tensor, f: Tensor, t: Tensor) -> Tensor:  # three models' hidden states `(m, width)`: l_i, `(m,)`
            q = (mask_free_logits(h, weight, ask.mask_id) / self.on_policy_temperature).softmax(-1)
            with torch.no_grad():
                logf = (mask_free_logits(f, fake_weight, ask.mask_id) / heat).log_softmax(-1)
                logp = mask_free_logits(t, teacher_weight, ask.mask_id).log_softmax(-1)
                gap = logf.clamp(min=self.dmd_floor) - logp.clamp(min=self.dmd_floor)
            return (q * gap).sum(-1)

        values = in_chunks(terms, hidden[again], fake, teacher, chunk=WHOLE_CHUNK)
        loss = mean(segment_mean(values, batch.block[again], batch.weight[again]))
        return loss, {"loss/kl": loss.detach()}

    def _anchor(self, batch: TrainingBatch, ask: Ask):
        logp = ask.student(lambda h, w: token_logprobs(h, w, batch.target[:, None], ask.mask_id))[:, 0]
        loss = -self.dmd_anchor * mean(logp, batch.labelled * batch.weight)
        return loss, {"loss/anchor": loss.detach() / self.dmd_anchor}


def masked_again(block: Tensor, noise: float = 1.0) -> Tensor:
    """Which tokens are masked: of the n of each block a number uniform in 1..ceil(noise * n), at random places.

    block: `(m,)`, the block of each token; the result is boolean `(m,)`.
    """
    most = (torch.bincount(block) * noise).ceil()
    number = 1 + (torch.rand(len(most), device=block.device) * most).long().minimum(most.long() - 1)
    return place_in_block(block, shuffle=True) < number[block]


def show_others(batch: TrainingBatch, again: Tensor, mask_id: int) -> TrainingBatch:
    """The batch with its targets filled in but for `again`, boolean `(m,)`, which is what it asks for."""
    fill = torch.where(again, mask_id, batch.target)
    ids = batch.input_ids.flatten().index_copy(0, batch.select, fill).view_as(batch.input_ids)
    return restate(batch, [ids], again.long() - 1)
