"""`tad`: hard labels for the tokens committed next, soft ones for those after (TAD, arXiv 2605.09536)."""

from dataclasses import dataclass

import numpy as np

from t3d.components import setting
from t3d.distill.batch import TrainingBatch
from t3d.distill.logprobs import token_logprobs
from t3d.distill.objective import Ask, Privileged, mean, register
from t3d.distill.objectives.soft import divergence
from t3d.distill.states import Response, State, step_index

NEAR, DISTANT = 0, 1


@register("tad")
@dataclass(frozen=True)
class TAD(Privileged):
    """Temporal-aware trajectory self-distillation. At the state before step t of a block,

        L = mean_{near} -log q(x_i) + w * mean_{distant} KL(p_teacher(i) || q(i)),   w = 1

    where *near* tokens were committed at steps t .. t + delta - 1 and *distant* ones later. t is uniform over the steps
    of each block, as the authors take every state of every trajectory. delta (`tad_near`) is 1 step, a quarter of a
    block of 4 tokens; theirs is 8 of 32. Their teacher is shown the reference in its prompt: the worked solution while
    it decodes, the final answer when the KL is taken. `reference_sees="answer"` does the second.
    """

    tad_near: int = setting(
        1, "tokens committed in the next this many steps are 'near' and learnt by cross-entropy", low=1
    )
    tad_kl_weight: float = setting(1.0, "weight of the KL divergence to the teacher on the others", low=0)

    def states(self, response: Response, rng: np.random.Generator, progress: float = 1.0):
        index, place, steps = step_index(response.block, response.step)
        states = []
        for _ in range(self.states_per_sequence):
            now = rng.integers(0, steps)[place]
            states.append(State(index >= now, part=np.where(index < now + self.tad_near, NEAR, DISTANT)))
        return states

    def loss(self, batch: TrainingBatch, ask: Ask):
        near, distant = batch.part == NEAR, batch.part == DISTANT
        teacher, teacher_weight = ask.reference(lambda h, w: (h[distant], w))

        def head(hidden, weight):
            logp = token_logprobs(hidden[near], weight, batch.target[near, None], ask.mask_id)[:, 0]
            return logp, divergence(hidden[distant], weight, teacher, teacher_weight, ask.mask_id)

        logp, kl = ask.student(head)
        ce, kl = -mean(logp, batch.weight[near]), mean(kl, batch.weight[distant])
        metrics = {"loss/ce": ce.detach(), "loss/kl": kl.detach(), "share_near": mean(near.float())}
        return ce + self.tad_kl_weight * kl, metrics
