"""`dparallel`: certainty-forcing distillation (dParallel, arXiv 2509.26488)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from t3d.components import setting
from t3d.distill.batch import TrainingBatch
from t3d.distill.logprobs import in_chunks, mask_free_logits
from t3d.distill.objective import Ask, Objective, mean, register
from t3d.distill.states import Response, State


@dataclass(frozen=True)
class Certainty(Objective):
    """Part: cross-entropy, and the entropy of what is right."""

    certain_parts: ClassVar[tuple[int, ...]] = (0, 1)  # the parts that the entropy is taken over

    certainty_weight: float = setting(2.0, "weight of the entropy of correct predictions", low=0)
    certainty_temperature: float = setting(0.5, "temperature of that entropy", above=0)

    def loss(self, batch: TrainingBatch, ask: Ask):
        temperature = self.certainty_temperature
        logp, entropy, right = ask.student(lambda h, w: certainty_terms(h, w, batch.target, ask.mask_id, temperature))
        masks = [batch.part == part for part in (0, 1)]
        ce = -sum(mean(logp, mask * batch.weight) for mask in masks)
        uncertainty = sum(mean(entropy, (masks[part] & right) * batch.weight) for part in self.certain_parts)
        metrics = {
            "loss/ce": ce.detach(),
            "loss/entropy": uncertainty.detach(),
            "share_right": mean(right.float()),
            "lp/real": mean(logp.detach()),
        }
        return ce + self.certainty_weight * uncertainty, metrics


@register("dparallel")
@dataclass(frozen=True)
class DParallel(Certainty):
    """Follow the trajectory, and be certain where that is right:

    L = sum over masks M of mean_{i in M} -log p(x_i) + w * mean_{i in C} H(p_T(i)),   C = {i in M: argmax p(i) = x_i}

    `p_T` is the prediction at temperature `T`, H its entropy; w = 2, T = .5. Every token of every block is masked with
    probability .5. As in the authors' code, every second state (`states_per_sequence` 2) masks what the one before it
    shows, and both masks have terms of their own. Where theirs has one half-masked block per sequence, the others
    being clean before it and wholly masked behind it, block diffusion has them all at once.
    """

    certainty_mask_ratio: float = setting(0.5, "share of tokens that are masked", above=0, below=1)

    def states(self, response: Response, rng: np.random.Generator, progress: float = 1.0):
        states = []
        for copy in range(self.states_per_sequence):
            complement = copy % 2 == 1
            masked = ~states[-1].masked if complement else rng.random(len(response.block)) < self.certainty_mask_ratio
            states.append(State(masked, part=int(complement)))
        return states


def certainty_terms(hidden: Tensor, weight: Tensor, target: Tensor, mask_id: int, temperature: float):
    """log p(target), the entropy of p at `temperature`, and whether p's mode is the target, each `(m,)`."""

    def terms(h: Tensor, x: Tensor):
        logits = mask_free_logits(h, weight, mask_id)
        logp = (logits / temperature).log_softmax(-1)
        entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)  # finite, so that the mask's 0 * log 0 is 0
        real = logits.gather(-1, x[:, None]).squeeze(-1) - logits.logsumexp(-1)
        return real, entropy, logits.argmax(-1) == x

    return in_chunks(terms, hidden, target)
