"""Flights: what a sequence's next forward computes, and what its answers make final.

A flight is a frozen dataclass of its own settings with one generator, `run`. It yields either a list of `Segment`s, the
tokens that the next forward carries beside those that are final, and gets that forward's logits; or a list of `Row`s,
block rows for the policy to decide on by these logits. All sequences of a batch take these turns together. Adding one
is a file in `flights/`, or a module that an installed package names under the entry point `t3d.flights`.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from t3d.blocks import Rule

if TYPE_CHECKING:
    from torch import Tensor

    from t3d.decoding.logprobs import Logprobs
    from t3d.engine.decide import Logits
    from t3d.engine.request import Sequence


@dataclass(eq=False)
class Block:
    """A block that is not final. Arrays are (block_size,); `tokens` is the mask's id where nothing is decided yet."""

    start: int  # absolute position
    mask_id: int
    tokens: np.ndarray  # int64
    fixed: np.ndarray  # bool: the prompt's
    step_map: np.ndarray  # int64, the step of the last commit
    confidence: np.ndarray  # float32
    revisions: np.ndarray  # int64
    quotas: tuple[int, ...]  # how many masks its schedule commits at each step
    step: int = 0  # steps so far that changed something
    changed: bool = True  # whether the last decision did
    memory: "dict[str, Tensor]" = field(default_factory=dict)  # the policy's
    logprobs: "Logprobs | None" = None  # if asked for; a copy shares them, and what it decides is not noted

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def masked(self) -> np.ndarray:
        """bool (block_size,). No token is ever the mask's id."""
        return self.tokens == self.mask_id

    def full(self) -> bool:
        """Whether nothing of it is masked."""
        return self.mask_id not in self.tokens.tolist()  # a fifth of what numpy takes for so few

    @property
    def progress(self) -> float:
        """Share of the block that is decided."""
        return 1.0 - float(self.masked().mean())

    def copy(self) -> "Block":
        names = ("tokens", "fixed", "step_map", "confidence", "revisions")
        memory = {name: value.clone() for name, value in self.memory.items()}
        return replace(self, memory=memory, **{name: getattr(self, name).copy() for name in names})

    def quota(self, step: int | None = None) -> int:
        """k_s: how many masks the schedule commits at a step, by default the next one."""
        return self.quotas[min(self.step if step is None else step, len(self.quotas) - 1)]

    def skip(self) -> None:
        """Go past steps that commit nothing: their forward would change nothing."""
        while self.step < len(self.quotas) and not self.quotas[self.step]:
            self.step += 1

    def same(self, other: "Block") -> bool:
        """Whether both are in the same state, as far as a forward can see."""
        return self.start == other.start and bool((self.tokens == other.tokens).all())


@dataclass(eq=False)
class Segment:
    """Consecutive tokens of one sequence in one forward, in places of their own behind what is final.

    `ids` int64 (n,); `want` bool (n,), whose logits are wanted. After the forward `rows` int64 (n,) says which row of
    the logits each has, -1 for none. of: the segment that the rules NEXT and EXCEPT look at, an earlier one here.
    """

    start: int  # absolute position of the first token
    ids: np.ndarray
    want: np.ndarray
    rule: Rule = Rule.BLOCK
    of: "Segment | None" = None
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(eq=False)
class Row:
    """A block for the policy to decide on. logits: int64 (block_size,), its places' rows of the logits, -1 for none."""

    block: Block
    logits: np.ndarray
    depth: int = 0  # blocks before it that are not final
    progress: float = 1.0  # of the block before
    must: bool = True  # it has to advance
    shadow: np.ndarray | None = None  # as `logits`, of the same places seen by everything but themselves
    draft: bool = False  # nothing of it is shown to who watches


@dataclass(frozen=True)
class Flight:
    """Base of all flights; see the module's text."""

    name: ClassVar[str]
    verifies: ClassVar[bool] = False  # it asks masks behind a draft what each predicts in its own place
    shifted: ClassVar[bool] = False  # it takes a model whose logits predict the next token
    full_attention: ClassVar[bool] = False  # it works where every token sees every other
    causal: ClassVar[bool] = False  # final tokens see only those before them, as in a model of blocks of one token

    @property
    def label(self) -> str:
        """What tables call it beside a policy; empty for one block after the other."""
        values = (getattr(self, f.name) for f in fields(self))
        return " ".join([self.name.replace("_", " "), *(f"{value:g}" for value in values)])

    @property
    def used(self) -> set[str]:
        """Its settings that make a difference as they are."""
        return {f.name for f in fields(self)}

    @property
    def most_final(self) -> int:
        """Blocks that can become final by one forward."""
        return 1

    def scratch_blocks(self, policy) -> int:
        """Blocks of the cache that it may need beyond the end of the text."""
        return 0

    def check(self, policy, config) -> None:
        """Raises T3DError if it cannot work with this policy and these settings."""

    def run(self, sequence: "Sequence") -> "Generator[list[Segment] | list[Row], Logits | None, None]":
        """Decodes the sequence, from where it is; blocks that are final go to `sequence.finish`, in order.

        Segments are answered with the forward's logits. It may return when the blocks hold all that can count; what it
        yields behind a block that ends the sequence is not done. Raises T3DError if the sequence cannot go on.
        """
        raise NotImplementedError


FLIGHTS: dict[str, type[Flight]] = {}


def register(name: str) -> Callable[[type[Flight]], type[Flight]]:
    """Class decorator: makes the flight known under the name that `flight` takes."""

    def add(cls: type[Flight]) -> type[Flight]:
        cls.name = name
        FLIGHTS[name] = cls
        return cls

    return add
