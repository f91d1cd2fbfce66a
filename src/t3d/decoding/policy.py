"""Decoding policies: which places of a block are committed, rewritten or masked again at a step.

A policy is a frozen dataclass of its own settings with one pure function, `decide`, over a batch of block rows. A row
is one block in flight of one sequence. The caller keeps the laws (`laws.py`), so a policy may say more than is allowed.
Adding one is a file in `policies/`, or a module that an installed package names under the entry point `t3d.policies`.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import Field, dataclass, fields
from functools import cache as cached
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from t3d.errors import T3DError

# What a policy may ask for besides confidences (`Policy.needs`)
ENTROPY = "entropy"  # nats of the untempered distribution at masked places
MARGIN = "margin"  # by how much the likeliest token's untempered probability is above the second's
UNIFORM = "uniform"  # a number in [0, 1) per place, from the sequence's own seed
FILLED = "filled"  # predictions at filled places too; the block ends when a forward changes nothing
SHADOW = "shadow"  # the probability of each filled token where everything but itself is seen
STOP = "stop"  # whether the proposed token ends the response
NEEDS = frozenset({ENTROPY, MARGIN, UNIFORM, FILLED, SHADOW, STOP})


@dataclass
class View:
    """What a policy sees; a row is one block at one step.

    Attributes:
        tokens: int64 (rows, block), the mask's id where masked.
        fixed: bool (rows, block), the prompt's.
        masked: bool (rows, block), masks that may be committed now: those inside the window.
        proposal: int64 (rows, block), the token drawn at each place that was asked.
        confidence: float32 (rows, block), of the proposal; -inf where not `masked`.
        quota: int64 (rows,), k_s, never more than the masks in the window.
        step: int64 (rows,), steps of this block that changed something.
        steps: int64 (rows,), the setting.
        depth: int64 (rows,), 0 for the first block that is not final.
        progress: float32 (rows,), share of the block before that is decided.
        must: bool (rows,), at least one mask will be committed, the most confident if the policy chooses none.
        entropy: float32 (rows, block), inf where not masked; with ENTROPY in `Policy.needs`, else None, as all below.
        margin: float32 (rows, block), -inf where not masked (MARGIN).
        uniform: float32 (rows, block) (UNIFORM).
        expected: int64 (rows, block), the likeliest token at filled places (FILLED).
        certainty: float32 (rows, block), its probability, -inf elsewhere (FILLED).
        shadow: float32 (rows, block), probability of the filled token, inf where masked or the prompt's (SHADOW).
        stop: bool (rows, block), the proposal ends the response (STOP).
    """

    tokens: Tensor
    fixed: Tensor
    masked: Tensor
    proposal: Tensor
    confidence: Tensor
    quota: Tensor
    step: Tensor
    steps: Tensor
    depth: Tensor
    progress: Tensor
    must: Tensor
    entropy: Tensor | None = None
    margin: Tensor | None = None
    uniform: Tensor | None = None
    expected: Tensor | None = None
    certainty: Tensor | None = None
    shadow: Tensor | None = None
    stop: Tensor | None = None

    def rows(self, index: Tensor) -> "View":
        """The batch cut to some of its rows."""
        cut = {f.name: getattr(self, f.name) for f in fields(self)}
        return View(**{name: None if value is None else value[index] for name, value in cut.items()})


@dataclass
class Decision:
    """What a policy says about its rows.

    Attributes:
        commit: bool (rows, block).
        rewrite: int64 (rows, block), another token for a filled place, the same where none.
        remask: bool (rows, block), filled places that become masks again.
    """

    commit: Tensor
    rewrite: Tensor | None = None
    remask: Tensor | None = None


@dataclass(frozen=True)
class Memory:
    """State that is born and dies with the block.

    Attributes:
        shape: "row" (1,), "place" (block,) or "vocabulary" (block, vocab), the last on the model's device.
        dtype: of its tensor.
        fill: its value at first.
    """

    shape: str = "row"
    dtype: torch.dtype = torch.float32
    fill: float = 0.0

    def new(self, block_size: int, vocabulary: int, device=None) -> Tensor:
        size = {"row": (1,), "place": (block_size,), "vocabulary": (block_size, vocabulary)}[self.shape]
        return torch.full(size, self.fill, dtype=self.dtype, device=device)


class Knobs:
    """A policy's settings over a batch: an attribute per setting, (rows, 1); of a text, the index of the choice."""

    def __init__(self, policies: list["Policy"]):
        for f in fields(policies[0]):
            values = [getattr(p, f.name) for p in policies]
            if f.metadata["choices"]:
                values = [f.metadata["choices"].index(value) for value in values]
            dtype = torch.float32 if isinstance(f.default, float) else torch.int64  # a value may be given as 1 for 1.0
            setattr(self, f.name, torch.tensor(values, dtype=dtype)[:, None])

    def rows(self, index: Tensor, device: torch.device) -> "Knobs":
        """The settings of some rows, on a device."""
        cut = copy(self)
        vars(cut).update({name: value[index].to(device) for name, value in vars(self).items()})
        return cut


@dataclass(frozen=True)
class Policy:
    """Base of all policies; see the module's text."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    memory: ClassVar[dict[str, Memory]] = {}
    most_revisions: ClassVar[int] = 8  # how often it may change one place that is filled, so that edits end
    scheduled: ClassVar[bool] = False  # commits just `quota` masks at every step, so `steps` sets the speed

    @property
    def uses_steps(self) -> bool:
        """Whether it looks at `view.quota` as a schedule, so that the setting `steps` matters."""
        return self.scheduled

    def decide(self, view: View, knobs: Knobs, memory: dict[str, Tensor]) -> Tensor | Decision:
        """What happens now, for all rows at once. `knobs` has the settings of all rows, `self` only those of the first.

        memory: name -> (rows, *shape); what is written into it is there at the block's next step.
        """
        raise NotImplementedError

    @classmethod
    def adjust(cls, logits: Tensor, knobs: Knobs, memory: dict[str, Tensor]) -> Tensor:
        """Logits to use instead, and what `decide` needs to know of them. Called only where overridden.

        logits: float32 (n, vocab) of n masked places; knobs: (n, 1), on the logits' device; memory: name -> (n, ...) of
        these places; what is written into it is kept, but for shape "row".
        """
        return logits

    @classmethod
    def speed(cls) -> Field | None:
        """The setting that trades speed for quality; None where `steps` does."""
        return next((f for f in fields(cls) if f.metadata.get("slow") is not None), None)


POLICIES: dict[str, type[Policy]] = {}


def register(name: str) -> Callable[[type[Policy]], type[Policy]]:
    """Class decorator: makes the policy known under the name that `strategy` takes."""

    def add(cls: type[Policy]) -> type[Policy]:
        cls.name = name
        if unknown := cls.needs - NEEDS:
            raise T3DError(
                f"policy {name!r} needs {min(unknown)!r}, which no view has; known: {', '.join(sorted(NEEDS))}"
            )
        POLICIES[name] = cls
        return cls

    return add


def _even(size: int, masks: int, steps: int) -> list[int]:
    """`size // steps` and one more for the first `size % steps` steps (SDAR, LLaDA)."""
    return [size // steps + (step < size % steps) for step in range(steps)]


def _rounded(size: int, masks: int, steps: int) -> list[int]:
    """The share of the masks that a linear noise level falls by, rounded, without the steps that commit nothing (dllm,
    whose float32 decides near halves)."""
    level = 1 - (1 - (np.arange(steps, -1, -1) / steps).astype(np.float32))
    return [k for k in _falling(masks, 1 - (level[1:] / level[:-1]).astype(float), np.rint) if k]


def _truncated(size: int, masks: int, steps: int) -> list[int]:
    """The same from noise level 1 to 0.001, cut to whole tokens; the last step takes what is left (Dream)."""
    level = torch.linspace(1, 1e-3, steps + 1).numpy()
    return _falling(masks, [*(1 - level[1:] / level[:-1])[:-1], 1.0], np.trunc)


def _falling(masks: int, shares, whole: Callable) -> list[int]:
    found = []
    for share in shares:
        found.append(min(masks, int(whole(masks * share))))
        masks -= found[-1]
    return found


SCHEDULES = {"even": _even, "rounded": _rounded, "truncated": _truncated}


@cached
def step_quotas(schedule: str, size: int, masks: int, steps: int) -> tuple[int, ...]:
    """k_s: tokens to commit at each step of a block of `size` tokens that begins with `masks` masks."""
    return tuple(SCHEDULES[schedule](size, masks, steps))


def rank(score: Tensor) -> Tensor:
    """Place of each entry when its row is sorted in descending order; of equals, the leftmost first. (rows, block)"""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)


def best(score: Tensor, count: Tensor) -> Tensor:
    """The `count` (rows,) highest of each row; of equals, the leftmost. bool (rows, block)"""
    return rank(score) < count[:, None]


def at_least_one(commit: Tensor, view: View) -> Tensor:
    """The choice and, in rows that must advance and chose nothing, the most confident mask. bool (rows, block)"""
    none = view.must & ~(commit & view.masked).any(-1)
    return commit | (best(view.confidence, none.long()) & view.masked) if bool(none.any()) else commit


def sorted_entropy(view: View) -> tuple[Tensor, Tensor]:
    """Ranks by ascending entropy, and at each place the sum of the entropies up to it in that order. (rows, block)"""
    place = rank(-view.entropy)
    total = view.entropy.sort(dim=-1, stable=True).values.cumsum(-1)
    return place, total.gather(-1, place)
