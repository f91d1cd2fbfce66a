"""Unmasking strategies: which of a block's masked positions are committed at a step.

A strategy is one function of a `Candidates` batch to a boolean `(rows, block)`; `@strategy(name)` registers it. The
caller makes sure of the rest: only masked positions are ever committed, and at least one per step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Candidates:
    """What a strategy may look at; a row is one block at one step. Positions that are not masked hold -inf confidence.

    masked: bool (rows, block). confidence: float32 (rows, block), of the sampled token. entropy: float32 (rows, block)
    in nats, or None unless the strategy asks for it. u: float32 (rows, block), uniform in [0, 1). quota: int64 (rows,),
    k_s, never more than the masks left. floor: int64 (rows,), the fewest tokens a dynamic step commits.
    threshold: float32 (rows,), the strategy's own bound.
    """

    masked: Tensor
    confidence: Tensor
    entropy: Tensor | None
    u: Tensor
    quota: Tensor
    floor: Tensor
    threshold: Tensor


@dataclass(frozen=True)
class Strategy:
    name: str
    commit: Callable[[Candidates], Tensor]
    needs_entropy: bool = False
    scheduled: bool = False  # commits exactly k_s per step, so a block takes a known number of steps


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


@strategy("low_confidence_static", scheduled=True)
def low_confidence_static(c: Candidates) -> Tensor:
    """The `k_s` most confident (LLaDA's and SDAR's low-confidence remasking)."""
    return _best(c.confidence, c.quota)


@strategy("low_confidence_dynamic")
def low_confidence_dynamic(c: Candidates) -> Tensor:
    """All with confidence above the threshold, and at least `floor` (1, or SDAR's `k_s`) of the most confident."""
    return (c.confidence > c.threshold[:, None]) | _best(c.confidence, c.floor)


def commit_mask(strategy: Strategy, c: Candidates) -> Tensor:
    """The positions committed now: what the strategy says, never an unmasked one, at least one. (rows, block)"""
    chosen = strategy.commit(c) & c.masked
    none = ~chosen.any(-1, keepdim=True)
    return chosen | (none & _best(c.confidence, torch.ones_like(c.quota)) & c.masked)
