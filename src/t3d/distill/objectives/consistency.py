"""`consistency`: agreement along the trajectory, inside a block (CDLM, arXiv 2511.19269)."""

import numpy as np

from t3d.distill.config import T3DConfig
from t3d.distill.data import TrainingBatch, when_committed
from t3d.distill.logprobs import token_logprobs
from t3d.distill.objectives.base import Forward, Objective, mean
from t3d.distill.objectives.soft import divergence
from t3d.distill.states import Response, State, step_index, uniform_mask

NEW, STILL, LATER, RANDOM = 0, 1, 2, 3


class Consistency(Objective):
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

    needs_reference = True
    keys = ("cdlm_",)
    beyond_length = True  # the states in which tokens were committed show what stands behind the stop, too

    def states(self, response: Response, rng: np.random.Generator, config: T3DConfig, progress: float = 1.0):
        index, place, steps = step_index(response.block, response.step)
        states = []
        for _ in range(config.states_per_sequence):
            first = rng.integers(0, steps)
            later = rng.integers(first + 1, steps + 1)[place]
            still = index >= later
            states.append(State(index >= first[place], part=np.where(still, STILL, NEW)))
            states.append(State(still, part=LATER))
            if config.cdlm_denoising:
                states.append(State(*uniform_mask(response.block, rng), part=RANDOM))
        return states

    def random_ratio(self, config: T3DConfig) -> float:
        return 0.0

    def loss(self, batch: TrainingBatch, student: Forward, reference: Forward, config: T3DConfig, mask_id: int):
        new, still, later, random = (batch.part == part for part in (NEW, STILL, LATER, RANDOM))
        teacher, teacher_weight = reference(lambda h, w: (h, w), when_committed(batch, new, mask_id))

        def head(hidden, weight):
            distil = divergence(hidden[new], weight, teacher, teacher_weight, mask_id)
            # a pair's copies list the same tokens in the same order
            agree = divergence(hidden[still], weight, hidden[later].detach(), weight.detach(), mask_id)
            return distil, agree, token_logprobs(hidden[random], weight, batch.target[random, None], mask_id)[:, 0]

        distil, agree, logp = student(head)
        distil, agree = mean(distil), mean(agree)
        metrics = {"loss/distil": distil.detach(), "loss/consistency": agree.detach()}
        loss = config.cdlm_distill * distil + config.cdlm_consistency * agree
        if config.cdlm_denoising:
            ce = -(logp * batch.weight[random]).sum() / max(len(batch.block[random].unique()), 1)
            loss, metrics["loss/ce"] = loss + config.cdlm_denoising * ce, ce.detach()
        return loss, metrics
