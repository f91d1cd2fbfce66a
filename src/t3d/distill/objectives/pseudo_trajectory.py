"""`pseudo_trajectory`: states that grow noisier and wider during training (d3LLM, arXiv 2601.07568)."""

from dataclasses import dataclass

import numpy as np

from t3d.components import setting
from t3d.distill.objective import register
from t3d.distill.objectives.dparallel import Certainty
from t3d.distill.states import Response, State, commit_rank
from t3d.errors import T3DError


@register("pseudo_trajectory")
@dataclass(frozen=True)
class PseudoTrajectory(Certainty):
    """dParallel's loss on states of the teacher's trajectory, made harder from the run's start to its end.

    In each block a window of tokens is learnt: what stands before it is visible, what stands behind it masked and not
    supervised; inside, the `ceil(r * n)` tokens that the teacher committed last are masked. With progress 0..1,

        r ~ U(low, .8), low from 0 to .8;   window from half of the block to all of it (the authors': 16 to 32 of 32)

    r is drawn per state, and one of each block's windows at random. As in the authors' code, every second state
    (`states_per_sequence` 2) masks what the one before it shows of the window, and enters with cross-entropy only.
    Theirs looks the mask up in the trajectory after "window's start plus unmasked tokens" steps, which can mask none of
    the window; here the window's own order decides, so that the ratio is kept. Their common factor 1/4 is left out.
    """

    certain_parts = (0,)

    pt_noise: tuple[float, ...] = setting(
        (0.0, 0.8), "lowest mask ratio at the start of training, and the highest at any time", low=0, high=1
    )
    pt_window: float = setting(
        0.5, "share of a block that is learnt at the start; at the end all of it", above=0, high=1
    )

    def __post_init__(self):
        if len(self.pt_noise) != 2 or self.pt_noise[0] > self.pt_noise[1]:
            raise T3DError(f"pt_noise is two rising numbers in 0..1, got {list(self.pt_noise)}")

    def states(self, response: Response, rng: np.random.Generator, progress: float = 1.0):
        states = []
        for copy in range(self.states_per_sequence):
            if copy % 2 == 0:
                shown, masked, behind = self.draw_window(response, rng, progress)
            learnt = masked if copy % 2 == 0 else shown
            states.append(State(learnt | behind, supervised=learnt, part=copy % 2))
        return states

    def draw_window(self, response: Response, rng: np.random.Generator, progress: float):
        """A window of every block: its shown tokens, its masked ones, and the tokens behind it; each boolean `(n,)`."""
        _, place, count = np.unique(response.block, return_inverse=True, return_counts=True)
        offset = np.arange(len(place)) - (count.cumsum() - count)[place]  # of each token in its block's tokens
        share = self.pt_window + (1 - self.pt_window) * progress
        width = np.maximum((share * count).astype(int), 1)
        start = (rng.integers(0, -(-count // width)) * width)[place]
        behind = offset >= start + width[place]
        window = (offset >= start) & ~behind
        rank = commit_rank(3 * place + window + 2 * behind, response.rank, np.zeros(len(place)))
        size = np.bincount(place, window)[place]
        least, most = self.pt_noise
        ratio = rng.uniform(least + progress * (most - least), most)
        masked = window & (rank >= size - np.maximum(np.ceil(ratio * size), 1))
        return window & ~masked, masked, behind
