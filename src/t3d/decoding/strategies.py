"""Unmasking strategies: which of a block's masked positions are committed at a step.

A strategy is one function of a `Candidates` batch to a boolean `(rows, block)`; `@strategy(name)` registers it. The
caller makes sure of the rest: only masked positions are ever committed, and at least one per step. Tensor methods
alone are used here, so that reading a recipe, which checks the names, does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Candidates:
    """What a strategy may look at; a row is one block at one step. Places that are not masked have confidence -inf.

    masked: bool (rows, block). confidence: float32 (rows, block), of the sampled token. entropy: float32 (rows, block)
    in nats, inf where not masked. u: float32 (rows, block), uniform in [0, 1). Both None unless a strategy asks.
    quota: int64 (rows,), k_s, never more than the masks left. floor: int64 (rows,), the fewest a dynamic step commits.
    threshold, entropy_bound, factor, risk: float32 (rows,), from the settings of the same names.
    """

    masked: Tensor
    confidence: Tensor
    entropy: Tensor | None
    u: Tensor | None
    quota: Tensor
    floor: Tensor
    threshold: Tensor
    entropy_bound: Tensor
    factor: Tensor
    risk: Tensor

    def rows(self, index: Tensor) -> Candidates:
        """The batch cut to some of its rows."""
        cut = {f.name: getattr(self, f.name) for f in fields(self)}
        return Candidates(**{name: None if value is None else value[index] for name, value in cut.items()})


@dataclass(frozen=True)
class Knob:
    """The setting that trades a strategy's speed for quality; from `slow` to `fast` it commits more per step."""

    name: str
    slow: float
    fast: float


@dataclass(frozen=True)
class Strategy:
    name: str
    commit: Callable[[Candidates], Tensor]
    needs_entropy: bool = False
    needs_random: bool = False
    knob: Knob | None = None  # None where `steps` alone sets the speed


STRATEGIES: dict[str, Strategy] = {}


def strategy(name: str, **traits):
    """Register a strategy under the name that `DecodingConfig.strategy` takes."""

    def register(commit):
        STRATEGIES[name] = Strategy(name, commit, **traits)
        return commit

    return register


def step_quota(block_size: int, steps: int, step: int) -> int:
    """k_s: tokens to commit at a step, `block_size // steps` and one more for the first `block_size % steps` steps."""
    return block_size // steps + (step < block_size % steps)


def rank(score: Tensor) -> Tensor:
    """Place of each entry when its row is sorted in descending order; of equals, the leftmost first. (rows, block)"""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)


def _best(score: Tensor, count: Tensor) -> Tensor:
    return rank(score) < count[:, None]


@strategy("low_confidence_static")
def low_confidence_static(c: Candidates) -> Tensor:
    """The `k_s` most confident (low-confidence remasking of LLaDA and SDAR)."""
    return _best(c.confidence, c.quota)


@strategy("low_confidence_dynamic", knob=Knob("threshold", 1.0, 0.0))
def low_confidence_dynamic(c: Candidates) -> Tensor:
    """All with confidence above the threshold, and at least `floor` (1, or SDAR's `k_s`) of the most confident."""
    return (c.confidence > c.threshold[:, None]) | _best(c.confidence, c.floor)


@strategy("sequential")
def sequential(c: Candidates) -> Tensor:
    """The `k_s` leftmost."""
    return c.masked.cumsum(-1) <= c.quota[:, None]


@strategy("random", needs_random=True)
def random(c: Candidates) -> Tensor:
    """`k_s` at random, by the sequence's own seed."""
    return _best(c.u.masked_fill(~c.masked, -inf), c.quota)


def _sorted_entropy(c: Candidates) -> tuple[Tensor, Tensor]:
    """Ranks by ascending entropy, and at each position the sum of the entropies up to it in that order."""
    place = rank(-c.entropy)
    total = c.entropy.sort(dim=-1, stable=True).values.cumsum(-1)
    return place, total.gather(-1, place)


@strategy("entropy_bounded_sdar", needs_entropy=True, knob=Knob("entropy_bound", 0.0, 20.0))
def entropy_bounded_sdar(c: Candidates) -> Tensor:
    """As many of the lowest entropy as keep their sum below the bound, the last one counted (SDAR's samplers)."""
    _, total = _sorted_entropy(c)
    return total < c.entropy_bound[:, None]


@strategy("entropy_bounded_eb", needs_entropy=True, knob=Knob("entropy_bound", 0.0, 20.0))
def entropy_bounded_eb(c: Candidates) -> Tensor:
    """As many of the lowest entropy as keep sum minus maximum within the bound (EB-Sampler, arXiv 2505.24857).

    Sorted by entropy the maximum is the last, so it is not counted: one token more than SDAR's rule, as a rule.
    """
    _, total = _sorted_entropy(c)
    return c.masked & (total - c.entropy.masked_fill(~c.masked, 0.0) <= c.entropy_bound[:, None])


@strategy("factor", knob=Knob("factor", 0.0, 64.0))
def factor(c: Candidates) -> Tensor:
    """The most confident `n`, for the largest `n` with `(n + 1) * (1 - c_(n)) < factor` (Fast-dLLM, arXiv 2505.22618).

    `c_(n)` is the n-th highest confidence; both factors grow with n, so each position can be asked by itself.
    """
    n = rank(c.confidence) + 1
    return (n + 1) * (1 - c.confidence) < c.factor[:, None]


@strategy("adaptive", knob=Knob("risk", 0.0, 64.0))
def adaptive(c: Candidates) -> Tensor:
    """As many steps as the model's own doubt asks for: `r = ceil(expected wrong tokens / risk)`, spread evenly.

    The expected number of wrong tokens, were all committed now, is the sum of `1 - confidence` over the `m` masked
    positions. The `ceil(m / r)` most confident are committed, and the next step asks again.
    """
    left = c.masked.sum(-1)
    doubt = (1 - c.confidence).masked_fill(~c.masked, 0.0).sum(-1)
    steps = (doubt / c.risk).nan_to_num(nan=1.0, posinf=inf).ceil()  # 0 / 0: no doubt, one step
    steps = steps.clamp(min=1.0).minimum(left.clamp(min=1).to(steps.dtype)).to(left.dtype)
    return _best(c.confidence, -(-left // steps))


def commit_mask(strategy: Strategy, c: Candidates) -> Tensor:
    """The positions committed now: what the strategy says, never an unmasked one, at least one. (rows, block)"""
    chosen = strategy.commit(c) & c.masked
    none = ~chosen.any(-1, keepdim=True)
    return chosen | (none & _best(c.confidence, c.quota.new_ones(c.quota.shape)) & c.masked)
