"""`consistency`: agreement along the trajectory, inside a block (CDLM, arXiv 2511.19269)."""

from dataclasses import dataclass

import numpy as np

from t3d.components import setting
from t3d.distill.batch import TrainingBatch, when_committed
from t3d.distill.logprobs import token_logprobs
from t3d.distill.objective import Ask, Privileged, mean, register
from t3d.distill.objectives.soft import divergence
from t3d.distill.states import Response, State, step_index, uniform_mask

NEW, STILL, LATER, RANDOM = 0, 1, 2, 3


@register("consistency")
@dataclass(frozen=True)
class Consistency(Privileged):
    """With a state y, a later state y* of the same trajectory, U the tokens committed between them, S those masked in
    both,

        L = w_d * mean_{i in U} KL(p_teacher(i) || q(i | y)) + w_c * mean_{i in S} KL(sg[q(i | y*)] || q(i | y))
            + w_m * cross-entropy at random masks (`random_ce`)

    `p_teacher(i)` is the teacher's distribution at the state in which i was committed. CDLM keeps hidden states of the
    rollout for it; here one teacher forward computes it for all of U, each noisy block once per step between y and y*.
    In CDLM y* is y with its block completed and S lies in later blocks. A block-diffusion model sees later blocks only
    when the earlier ones are done, so here both states and S lie in one block: y is uniform over the block's steps, and
    y* over what follows, completion included. The public descriptions give no weights: w_d = 1, w_c = .5 and w_m = 0
    are our choice, the last because it is CDLM's term on ground-truth text, which trajectories do not hold.
    A sequence has `states_per_sequence` pairs of noisy copies, each with a third copy where w_m is not 0.
    """

    beyond_length = True  # the states in which tokens were committed show what stands behind the stop, too

    cdlm_distill: float = setting(1.0, "weight of the teacher's distribution at the tokens that come next", low=0)
    cdlm_consistency: float = setting(0.5, "weight of agreement with the student's own later state", low=0)
    cdlm_denoising: float = setting(
        0.0, "weight of the cross-entropy at random masks; 0: none, and one copy less", low=0
    )

    def states(self, response: Response, rng: np.random.Generator, progress: float = 1.0):
        index, place, steps = step_index(response.block, response.step)
        states = []
        for _ in range(self.states_per_sequence):
            first = rng.integers(0, steps)
            later = rng.integers(first + 1, steps + 1)[place]
            still = index >= later
            states.append(State(index >= first[place], part=np.where(still, STILL, NEW)))
            states.append(State(still, part=LATER))
            if self.cdlm_denoising:
                states.append(State(*uniform_mask(response.block, rng), part=RANDOM))
        return states

    def loss(self, batch: TrainingBatch, ask: Ask):
        new, still, later, random = (batch.part == part for part in (NEW, STILL, LATER, RANDOM))
        teacher, teacher_weight = ask.reference(lambda h, w: (h, w), when_committed(batch, new, ask.mask_id))

        def head(hidden, weight):
            distil = divergence(hidden[new], weight, teacher, teacher_weight, ask.mask_id)
            # a pair's copies list the same tokens in the same order
            agree = divergence(hidden[still], weight, hidden[later].detach(), weight.detach(), ask.mask_id)
            return distil, agree, token_logprobs(hidden[random], weight, batch.target[random, None], ask.mask_id)[:, 0]

        distil, agree, logp = ask.student(head)
        distil, agree = mean(distil, batch.weight[new]), mean(agree, batch.weight[still])
        metrics = {"loss/distil": distil.detach(), "loss/consistency": agree.detach()}
        loss = self.cdlm_distill * distil + self.cdlm_consistency * agree
        if self.cdlm_denoising:
            ce = -(logp * batch.weight[random]).sum() / max(len(batch.block[random].unique()), 1)
            loss, metrics["loss/ce"] = loss + self.cdlm_denoising * ce, ce.detach()
        return loss, metrics
