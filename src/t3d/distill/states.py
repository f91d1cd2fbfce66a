"""States of a trajectory: what the decoder saw of a block before one of its steps. Pure functions of arrays.

A state shows the tokens of each block that were committed first and masks the rest. All arrays run over the `n`
response tokens of one sequence, in order; `block` is each token's block id.
"""

from dataclasses import dataclass

import numpy as np

RATIOS = np.array([1.0, 0.75, 0.5, 0.25])
ORDERS = ("trajectory", "reversed", "random")


@dataclass
class Response:
    """A trajectory's `n` response tokens, as an objective sees them when it draws states. All `(n,)`."""

    block: np.ndarray  # block id
    step: np.ndarray  # denoising step, in its block, at which the token was committed
    rank: np.ndarray  # place in the order in which its block was committed
    group: np.ndarray  # first of the blocks that are noisy together with its own


@dataclass
class State:
    """One noisy state of a response. All `(n,)`; what is left out: every mask supervised, weight 1, part 0."""

    masked: np.ndarray  # which tokens are hidden
    weight: np.ndarray | None = None  # for the objective's own use
    supervised: np.ndarray | None = None  # which of the hidden tokens the loss is taken at
    part: np.ndarray | int = 0  # which term of the loss a token belongs to

    def __post_init__(self):
        if self.weight is None:
            self.weight = np.ones(len(self.masked))
        if self.supervised is None:
            self.supervised = self.masked
        self.part = np.broadcast_to(np.asarray(self.part), self.masked.shape)


def commit_rank(block: np.ndarray, step: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Each token's place (0-based) in the order in which its block's tokens were committed, `(n,)`.

    Tokens of one step are ordered by confidence, highest first, then by position.
    """
    order = np.lexsort((np.arange(len(block)), -confidence, step, block))
    rank = np.empty(len(block), dtype=np.int64)
    rank[order] = _index_in_block(block[order])
    return rank


def trajectory_mask(
    block: np.ndarray,
    rank: np.ndarray,
    rng: np.random.Generator,
    exponent: float = 8.0,
    per_block: bool = False,
    order: str = "trajectory",
    group: np.ndarray | None = None,
) -> np.ndarray:
    """Which tokens a T3D state masks, boolean `(n,)`: in each block of n tokens the `ceil(r * n)` committed last.

    r is drawn from {1, .75, .5, .25} with probability proportional to `r ** exponent`, once per sequence or per block
    (arXiv 2602.12262, section 4). order "reversed" masks the first committed instead (as the authors' release does),
    "random" any.
    group `(n,)`: with draws per block, ratios rise from left to right among the blocks of a group.
    """
    starts, inverse, count = np.unique(block, return_inverse=True, return_counts=True)
    weight = RATIOS**exponent
    draws = rng.choice(RATIOS, size=len(starts) if per_block else 1, p=weight / weight.sum())
    if per_block and group is not None:
        draws = rising(draws, inverse, group)
    masked = np.broadcast_to(np.ceil(draws * count), len(starts)).astype(np.int64)[inverse]
    if order == "reversed":
        return rank < masked
    if order == "random":
        rank = random_rank(block, rng)
    return rank >= count[inverse] - masked


def uniform_mask(
    block: np.ndarray, rng: np.random.Generator, group: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mask 1..n tokens of every block, the number uniform and the places random: `(mask, weight)`, both `(n,)`.

    The weight, 1 over the number of masks in the block, makes the cross-entropy the block-diffusion bound
    (BD3-LM, arXiv 2503.09573). group `(n,)`: the numbers rise from left to right among the blocks of a group.
    """
    _, inverse, count = np.unique(block, return_inverse=True, return_counts=True)
    masked = rng.integers(1, count + 1)
    masked = (masked if group is None else np.minimum(rising(masked, inverse, group), count))[inverse]
    return random_rank(block, rng) < masked, 1.0 / masked


def draw_groups(block: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Consecutive blocks put together, 1 to `size` of them as chance says: each token's first block, `(n,)`.

    (Multi-block teacher forcing, arXiv 2606.29215.)
    """
    blocks, inverse = np.unique(block, return_inverse=True)
    ends = rng.integers(1, size + 1, len(blocks)).cumsum()
    return blocks[np.r_[0, ends][np.searchsorted(ends, np.arange(len(blocks)), side="right")]][inverse]


def rising(draws: np.ndarray, place: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Draws of blocks `(blocks,)`, put in rising order among those of a group; place, group: of each token `(n,)`."""
    of_block = np.zeros(len(draws), dtype=np.int64)
    of_block[place] = group
    return draws[np.lexsort((draws, of_block))]


def random_rank(block: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of the tokens inside each block, `(n,)`."""
    return commit_rank(block, np.zeros(len(block)), rng.random(len(block)))


def step_index(block: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the steps at which each block's tokens were committed 0, 1, ... without gaps.

    Returns each token's number and its block's, both `(n,)`, and how many steps each block has, `(blocks,)`.
    """
    pairs, inverse = np.unique(np.stack([block, step], 1), axis=0, return_inverse=True)
    index = _index_in_block(pairs[:, 0])[inverse.reshape(-1)]
    _, place = np.unique(block, return_inverse=True)
    return index, place, np.bincount(np.unique(pairs[:, 0], return_inverse=True)[1])


def replace_with_random(
    ids: np.ndarray, masked: np.ndarray, ratio: float, vocabulary: int, mask_id: int, rng: np.random.Generator
) -> np.ndarray:
    """Mask `ids` where `masked`, but put a uniformly random other token in a share `ratio` of those places."""
    noisy = np.where(masked, mask_id, ids)
    if ratio > 0:
        swap = masked & (rng.random(len(ids)) < ratio)
        other = rng.integers(0, vocabulary - 1, size=len(ids))
        noisy = np.where(swap, other + (other >= mask_id), noisy)
    return noisy


def _index_in_block(block: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal block ids (sorted input)."""
    starts = np.flatnonzero(np.r_[True, block[1:] != block[:-1]])
    return np.arange(len(block)) - np.repeat(starts, np.diff(np.r_[starts, len(block)]))
