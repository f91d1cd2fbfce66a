"""`tad`: hard labels for the tokens committed next, soft ones for those after (TAD, arXiv 2605.09536)."""

import numpy as np

from t3d.distill.config import T3DConfig
from t3d.distill.data import TrainingBatch
from t3d.distill.logprobs import token_logprobs
from t3d.distill.objectives.base import Forward, Objective, mean
from t3d.distill.objectives.soft import divergence
from t3d.distill.states import Response, State, step_index

NEAR, DISTANT = 0, 1


class TAD(Objective):
    """Temporal-aware trajectory self-distillation. At the state before step t of a block,

        L = mean_{near} -log q(x_i) + w * mean_{distant} KL(p_teacher(i) || q(i)),   w = 1

    where *near* tokens were committed at steps t .. t + delta - 1 and *distant* ones later. t is uniform over the steps
    of each block, as the authors take every state of every trajectory. delta (`tad_near`) is 1 step, a quarter of a
    block of 4 tokens; theirs is 8 of 32. Their teacher is shown the reference answer, in its prompt, while it decodes
    and when the KL is taken; trajectories here hold no such prompt, so ours is not.
    """

    needs_reference = True
    keys = ("tad_",)

    def states(self, response: Response, rng: np.random.Generator, config: T3DConfig, progress: float = 1.0):
        index, place, steps = step_index(response.block, response.step)
        states = []
        for _ in range(config.states_per_sequence):
            now = rng.integers(0, steps)[place]
            states.append(State(index >= now, part=np.where(index < now + config.tad_near, NEAR, DISTANT)))
        return states

    def random_ratio(self, config: T3DConfig) -> float:
        return 0.0

    def loss(self, batch: TrainingBatch, student: Forward, reference: Forward, config: T3DConfig, mask_id: int):
        near, distant = batch.part == NEAR, batch.part == DISTANT
        teacher, teacher_weight = reference(lambda h, w: (h[distant], w))

        def head(hidden, weight):
            logp = token_logprobs(hidden[near], weight, batch.target[near, None], mask_id)[:, 0]
            return logp, divergence(hidden[distant], weight, teacher, teacher_weight, mask_id)

        logp, kl = student(head)
        ce, kl = -mean(logp), mean(kl)
        metrics = {"loss/ce": ce.detach(), "loss/kl": kl.detach(), "share_near": mean(near.float())}
        return ce + config.tad_kl_weight * kl, metrics
