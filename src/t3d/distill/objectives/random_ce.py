"""`random_ce`: cross-entropy to the rollouts' tokens with random masks, which forgets the order of commitment."""

from t3d.distill.objectives.sft import SFT


class RandomCE(SFT):
    """`sft`'s loss, with the teacher's rollouts in place of ground truth: the naive baseline of arXiv 2602.12262."""
