"""`random_ce`: cross-entropy to the rollouts' tokens with random masks, which forgets the order of commitment."""

from dataclasses import dataclass

from t3d.distill.objective import ROLLOUTS, register
from t3d.distill.objectives.sft import SFT


@register("random_ce")
@dataclass(frozen=True)
class RandomCE(SFT):
    """`sft`'s loss, with the teacher's rollouts in place of ground truth: the naive baseline of arXiv 2602.12262."""

    source = ROLLOUTS
