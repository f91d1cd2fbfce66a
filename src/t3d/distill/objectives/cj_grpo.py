"""`cj_grpo`: reinforcement learning along the decoding trajectory (CJ-GRPO, arXiv 2509.23924)."""

from dataclasses import dataclass

import numpy as np
import torch

from t3d.components import setting
from t3d.distill.batch import TrainingBatch
from t3d.distill.objective import Ask, Referenced, Reinforced, mean, register, segment_mean
from t3d.distill.states import Response, State, step_index


@register("cj_grpo")
@dataclass(frozen=True)
class CJGRPO(Reinforced, Referenced):
    """What is optimised is what was decoded: the policy ratio is taken at every step of every block by itself.

    With A the advantage, `r = p_new(token | state_i) / p_old(token | state_i)` at the places U_i that step i committed,
    and `d = log p_reference - log p_new`:

        L = mean over steps i of mean over U_i of [-min(r A, clip(r, 1 - eps, 1 + eps) A) + beta (exp(d) - d - 1)]

    eps = `rl_clip`, beta = `rl_kl`. p is what tokens are sampled from: at `rl_temperature`, without the mask token.
    The authors' eps is .5 in their runs. A group whose rewards are equal gives nothing, and is left out of the means.
    """

    unit = "block"  # a noisy block is one step's state of one block

    rl_clip: float = setting(0.2, "how far from 1 a ratio still counts", above=0, high=1)
    rl_kl: float = setting(0.04, "weight of the KL to the reference at the sampled tokens; 0: none", low=0)

    def states(self, response: Response, rng: np.random.Generator, progress: float = 1.0) -> list[State]:
        """One for each step: it hides what that step and later ones committed, and supervises what that step did."""
        turn, _, steps = step_index(response.block, response.step)
        return [State(turn >= i, supervised=turn == i) for i in range(max(steps))]

    def loss(self, batch: TrainingBatch, ask: Ask):
        policy = self.policy(batch, ask.mask_id)
        logp = ask.student(policy)
        ratio, advantage = (logp - batch.old_logp).exp(), batch.advantage
        near = ratio.clamp(1 - self.rl_clip, 1 + self.rl_clip)
        gain = torch.minimum(ratio * advantage, near * advantage)
        loss = mean(segment_mean(-gain, batch.block, batch.weight))
        clipped = (gain < ratio * advantage).float()
        metrics = {"loss/policy": loss.detach(), "clipped": mean(clipped), "ratio": mean(ratio.detach())}
        if self.rl_kl:
            d = ask.reference(policy) - logp
            kl = mean(segment_mean(torch.expm1(d) - d, batch.block, batch.weight))
            loss, metrics["loss/kl"] = loss + self.rl_kl * kl, kl.detach()
        return loss, metrics
