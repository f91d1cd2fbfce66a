"""What an objective is, the parts that several of them share, and their registry.

An objective is a frozen dataclass of its own settings with two functions: `states` draws what the student sees, `loss`
says what it should have predicted. Parts are bases with settings of their own, so an objective has those that it names.
Adding one is a file in `objectives/`, or a module that an installed package names under the entry point
`t3d.objectives`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from t3d.components import setting
from t3d.distill.batch import TrainingBatch
from t3d.distill.logprobs import token_logprobs
from t3d.distill.rewards import find_reward
from t3d.distill.states import ORDERS, Response, State, trajectory_mask, uniform_mask

# Runs a model and applies `head(hidden (m, width), lm_head weight)` at the supervised positions: of the batch at hand,
# or of another given as second argument.
Forward = Callable[..., Any]

# Where the trajectories come from that an objective learns from
ROLLOUTS = "rollouts"  # the teacher's, of the stage before
SOLUTIONS = "solutions"  # the task's own ground truth


@dataclass
class Ask:
    """The models of a step, as an objective may ask them."""

    student: Forward
    reference: Forward | None
    mask_id: int
    critic: Forward | None = None


@dataclass(frozen=True)
class Objective:
    """Base of all objectives; see the module's text."""

    name: ClassVar[str]
    source: ClassVar[str] = ROLLOUTS
    needs_reference: ClassVar[bool] = False
    lasting_reference: ClassVar[bool] = False  # a fixed reference's values are few, the same whatever the student does
    beyond_length: ClassVar[bool] = False  # whether the tokens behind the stop, which nobody reads, are supervised
    unit: ClassVar[str] = "token"  # what the loss is a mean over: supervised "token"s, noisy "block"s or "sequence"s
    # Settings of parts, as they read where an objective lacks the part; without types, else they would be fields
    random_ratio = 0.0
    round_interval = 0
    reference_sees = "prompt"
    on_policy_share = 0.0
    draft_share = 0.0
    fake_updates = 0
    rl_updates = 0

    states_per_sequence: int = setting(
        1, "noisy states of one trajectory that share its clean copy in a forward", low=1
    )
    group_size: int = setting(
        1,
        "up to this many consecutive blocks are noisy together and see each other from left to right, as several "
        "blocks in flight do",
        low=1,
    )
    late_weight: float = setting(
        0.0,
        "a token weighs 1 + this * r, r from 0 for those of its block that were committed first to 1 for the last",
        low=0,
    )
    late_by: str = setting(
        "step", "what r is counted in: the steps of the block, or the ranks of its tokens", choices=("step", "rank")
    )
    stop_weight: float = setting(1.0, "weight of the stop token that ends a response, beside the others' 1", low=0)
    stop_ce: float = setting(
        0.0, "weight of an extra cross-entropy on the stop token that ends a response (ECHO, arXiv 2604.09450)", low=0
    )

    def states(self, response: Response, rng: np.random.Generator, progress: float = 1.0) -> list[State]:
        """The noisy states of a response that share its clean copy, `states_per_sequence` or a multiple of them.

        progress: share of the training that is done, 0..1, for objectives that grow harder.
        """
        raise NotImplementedError

    def loss(self, batch: TrainingBatch, ask: Ask) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, a mean over `unit`s, and detached scalars to log."""
        raise NotImplementedError

    @property
    def needs_critic(self) -> bool:
        return self.fake_updates > 0


@dataclass(frozen=True)
class AnyStates(Objective):
    """Part: states of any kind, each token of them by itself."""

    state: str = setting(
        "trajectory",
        "what a state masks: of each block the tokens committed last ('trajectory'), a random number at random "
        "places ('uniform'), or all of them ('all_masked')",
        choices=("trajectory", "uniform", "all_masked"),
    )
    mask_exponent: float = setting(
        8.0, "trajectory states: mask ratios are drawn from {1, .75, .5, .25} with probability ~ ratio ** this"
    )
    mask_per_block: bool = setting(
        False, "trajectory states: draw the mask ratio for every block instead of once per sequence"
    )
    order: str = setting(
        "trajectory",
        "trajectory states: which tokens stay masked: the last committed ('trajectory'), 'reversed' or 'random'",
        choices=ORDERS,
    )
    random_ratio: float = setting(
        0.1, "share of masked inputs replaced by random tokens (still supervised)", low=0, high=1
    )
    draft_share: float = setting(
        0.0,
        "share of steps in which what is masked shows the student's own choice, right or wrong, and is learnt all the "
        "same: for policies that revise (DMax, arXiv 2604.08302)",
        low=0,
        high=1,
    )

    def states(self, response: Response, rng: np.random.Generator, progress: float = 1.0) -> list[State]:
        return [State(self.masked(response, rng)) for _ in range(self.states_per_sequence)]

    def masked(self, response: Response, rng: np.random.Generator) -> np.ndarray:
        """Which of the `n` response tokens one state hides, boolean `(n,)`."""
        block = response.block
        if self.state == "trajectory":
            how = (self.mask_exponent, self.mask_per_block, self.order, response.group)
            return trajectory_mask(block, response.rank, rng, *how)
        if self.state == "uniform":
            return uniform_mask(block, rng, response.group)[0]
        return np.ones(len(block), dtype=bool)


@dataclass(frozen=True)
class Referenced(Objective):
    """Part: a frozen reference, the teacher or an earlier student."""

    needs_reference: ClassVar[bool] = True

    round_interval: int = setting(
        0, "replace the reference by the student every this many optimizer steps; 0: never", low=0
    )
    reference_ema: float = setting(
        0.0, "a round keeps this share of the reference's weights; 0: it becomes the student", low=0, below=1
    )
    reference_path: str | None = setting(
        None, "checkpoint folder or hub id of the reference; default: the model that the training starts from"
    )
    reference_offload: bool = setting(False, "keep the reference on the CPU and bring each layer for its forward")


@dataclass(frozen=True)
class Privileged(Referenced):
    """Part: a reference that may be shown the reference answer, for losses that learn its distributions (TAD, arXiv
    2605.09536).

    Not for those that compare the two models at given tokens: a margin (`t3d`, `ddo`) or an anchor (`cj_grpo`) is
    between two predictions in the same state.
    """

    reference_sees: str = setting(
        "prompt",
        "what the reference is shown before a response: the student's 'prompt', or the task's reference 'answer', too",
        choices=("prompt", "answer"),
    )


@dataclass(frozen=True)
class OnPolicy(Objective):
    """Part: contexts that the student itself decodes, for losses that need no labels."""

    on_policy_share: float = setting(0.0, "share of steps in contexts that the student itself decodes", low=0, high=1)
    on_policy_steps: tuple[int, ...] = setting((1, 2), "denoising steps per block of the student's own contexts", low=1)
    on_policy_temperature: float = setting(0.5, "temperature of the student's own contexts", low=0)


@dataclass(frozen=True)
class Critical(Objective):
    """Part: a critic, a second model that learns what the student itself writes, in the steps with own contexts."""

    fake_updates: int = setting(1, "updates of the fake model before each step of the student; 0: none is kept", low=0)
    fake_learning_rate: float = setting(0.0, "the fake model's constant rate; 0: the student's peak rate", low=0)

    def critic_loss(self, batch: TrainingBatch, critic: Forward, mask_id: int) -> Tensor:
        """The scalar that the critic minimises."""
        raise NotImplementedError


@dataclass(frozen=True)
class Reinforced(Objective):
    """Part: groups of answers that the student itself decodes to the trajectories' prompts, with rewards.

    An answer's advantage is its reward minus its group's mean.
    """

    rl_group: int = setting(6, "answers to each prompt, compared with each other", low=2)
    rl_steps: int = setting(1, "denoising steps per block of these answers", low=1)
    rl_threshold: float = setting(
        0.0,
        "above 0: their steps commit what is more confident than this (low_confidence_dynamic) instead",
        low=0,
        below=1,
    )
    rl_temperature: float = setting(1.0, "temperature of these answers, and of the policy that is optimised", above=0)
    rl_updates: int = setting(1, "optimizer steps that learn from the same answers", low=1)
    rl_reward: str = setting(
        "accuracy",
        "what an answer is worth: 'accuracy' (the task's verdict), 'format' (whether it stopped by itself), or a "
        "function of (text, trajectory, forwards) as module:function",
    )
    rl_cost: float = setting(
        0.0,
        "subtracted from the reward: this * the answer's forwards / those of the stored answer in full steps",
        low=0,
    )

    def __post_init__(self):
        find_reward(self.rl_reward)

    def policy(self, batch: TrainingBatch, mask_id: int) -> Callable[[Tensor, Tensor], Tensor]:
        """A head that gives `log p` of the batch's tokens under what they are sampled from, `(m,)`."""
        return lambda hidden, weight: token_logprobs(
            hidden / self.rl_temperature, weight, batch.target[:, None], mask_id
        )[:, 0]


def other_default(owner: type, name: str, default) -> Any:
    """The field `name` of a part with another default, for an objective that redefines it."""
    part = next(f for f in fields(owner) if f.name == name)
    return setting(default, **part.metadata)


OBJECTIVES: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Class decorator: makes the objective known under the name that `train.objective` takes."""

    def add(cls: type[Objective]) -> type[Objective]:
        cls.name = name
        OBJECTIVES[name] = cls
        return cls

    return add


def total_loss(objective: Objective, batch: TrainingBatch, ask: Ask) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective's loss, with `stop_ce` times the mean cross-entropy at the tokens that end a response."""
    stop = (batch.stop * batch.labelled).bool()
    if not objective.stop_ce or not stop.any():
        return objective.loss(batch, ask)
    found = []

    def student(head, *other):
        if other:  # another version of the batch, in which the tokens that end a response stand elsewhere
            return ask.student(head, *other)

        def both(hidden, weight):  # inside the forward: there a sharded head is whole
            return head(hidden, weight), token_logprobs(hidden[stop], weight, batch.target[stop, None], ask.mask_id)

        result, logp = ask.student(both)
        found.append(logp)
        return result

    loss, metrics = objective.loss(batch, replace(ask, student=student))
    ce = -mean(torch.cat(found)[:, 0])
    return loss + objective.stop_ce * ce, metrics | {"loss/stop": ce.detach()}


def segments(segment: Tensor) -> int:
    """How many segments `0 .. max` there are; of no positions none."""
    return int(segment.max()) + 1 if len(segment) else 0


def mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted mean of `values`, a boolean weight picks; 0 of none, so that an empty term costs nothing."""
    weight = torch.ones_like(values) if weight is None else weight.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp(min=1e-9)


def segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    """Sum of `values (m,)` in each segment `0 .. max`, `(segments,)`."""
    return values.new_zeros(segments(segment)).index_add(0, segment, values)


def segment_mean(values: Tensor, segment: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted mean of `values (m,)` in each segment, `(segments,)`; 0 where all weights are."""
    weight = torch.ones_like(values) if weight is None else weight.to(values.dtype)
    return segment_sum(values * weight, segment) / segment_sum(weight, segment).clamp(min=1e-9)
