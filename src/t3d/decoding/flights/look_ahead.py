"""Exact look-ahead: one forward decodes the next state and, in copies of their own, states that may follow."""

from dataclasses import dataclass

import numpy as np

from t3d.components import setting
from t3d.decoding.flight import Block, Flight, Row, Segment, register
from t3d.decoding.flights.multi_block import ask, complete, row
from t3d.decoding.policy import SHADOW
from t3d.errors import T3DError

State = list[Block]  # where decoding is, or would be: complete blocks that are not final, and the one to decide next


def same(one: State, other: State) -> bool:
    """Whether a forward sees the same in both."""
    return len(one) == len(other) and all(a.same(b) for a, b in zip(one, other, strict=True))


def following(state: State, sequence) -> State | None:
    """The state after its last block was decided on; None where the text ends."""
    last = state[-1]
    if not complete(last, sequence.policy):
        return state
    stops = np.isin(last.tokens[~last.fixed], sequence.request.config.stop_ids)
    if last.end >= sequence.request.end or stops.any():
        return None
    return [*state, sequence.new_block(last.end)]


@dataclass
class Copy:
    """A state in a forward, with masked blocks behind it."""

    blocks: list[Block]
    segments: list[Segment]

    def row(self, block: Block, draft: bool = False) -> Row:
        """The row of a block, by the logits of the one that this copy has in its place."""
        found = row(block, self.segments, draft=draft)
        if draft:  # less may be masked than was
            found.logits = np.where(block.masked(), found.logits, -1)
        return found

    def has(self, block: Block, sequence) -> bool:
        """Whether all that a policy may decide on now was asked."""
        inside = self.blocks[0].start <= block.start < self.blocks[-1].end
        return inside and bool((self.row(block).logits[sequence.window(block)] >= 0).all())

    def distance(self, state: State) -> float:
        """How far what this copy showed is from the state: a wrong token misleads more than a mask."""
        total = 0.0
        for mine, other in zip(self.blocks, state, strict=False):
            differs, masked = mine.tokens != other.tokens, mine.masked()
            total += float((differs & ~masked).sum() + 0.5 * (differs & masked).sum())
        return total


@dataclass(eq=False)
class Guess:
    """A state that may follow, and how probable that seems.

    decided: the state in which the last decision was just made, before a next block begins. others: (probability ratio,
    place, token) of its second choices, the most probable first, of which the first `tried` were made guesses already.
    """

    state: State
    decided: State
    probability: float
    others: list[tuple[float, int, int]]
    tried: int = 0


@register("look_ahead")
@dataclass(frozen=True)
class LookAhead(Flight):
    """The tokens, step map and confidences of one block in flight, in fewer forwards.

    A forward carries the state that decoding is in and, in copies beside it, the `depth` states that seem most likely
    to follow. The policy decides on the true state; where a copy shows the state that this leads to, its logits are
    those that decoding would compute next, and the next decision follows in the same forward. Where none does, nothing
    is lost but the extra tokens. A state is a block at a step: with one step per block, drafts are of whole blocks.
    Drafts are the policy's own decisions on logits of states that have passed. Nothing is approximate, with a
    temperature neither, since a place's random number depends on seed, position and step alone.

    Lossless drafts by the model itself are also in SSD (arXiv 2510.04147) and Spiffy (arXiv 2509.18085), within a
    block.
    """

    depth: int = setting(1, "drafts that a forward checks", low=1, high=3)

    @property
    def label(self) -> str:
        return f"look-ahead {self.depth}"

    @property
    def most_final(self) -> int:
        return self.depth + 1

    def scratch_blocks(self, policy) -> int:
        blocks = sum(draft + 2 for draft in range(self.depth + 1))  # complete ones, the current one, one behind it
        return (2 if SHADOW in policy.needs else 1) * blocks - 1

    def check(self, policy, config) -> None:
        if config.blocks_in_flight > 1:
            raise T3DError("blocks_in_flight is a setting of the flight multi_block; look_ahead has depth")

    def run(self, sequence):
        state, drafts = [sequence.new_block(sequence.at)], []
        while True:
            copies = [self.copy(some, sequence) for some in (state, *drafts)]
            logits = yield [segment for copy in copies for segment in copy.segments]
            right: Copy | None = copies[0]
            while right is not None:
                yield [right.row(state[-1])]
                after = following(state, sequence)
                if after is None:
                    for block in state:
                        sequence.finish(block)
                    return
                state = after
                right = next((c for c, d in zip(copies[1:], drafts, strict=True) if same(state, d)), None)
            drafts = yield from self.drafts(state, copies, logits, sequence)
            for block in state[:-1]:
                sequence.finish(block)
            state = state[-1:]

    def copy(self, state: State, sequence) -> Copy:
        """The state and, where drafts may come to be about it, the next block, masked."""
        blocks = [block.copy() for block in state]  # as they are now
        last = blocks[-1]
        if last.end < sequence.request.end and self.may_complete(last, sequence):
            blocks.append(sequence.new_block(last.end))
        return Copy(blocks, ask(blocks, sequence))

    def may_complete(self, block: Block, sequence) -> bool:
        """Whether the decisions before the last draft can complete the block."""
        if not sequence.policy.scheduled or sequence.request.config.window is not None:
            return True
        steps = range(block.step, block.step + self.depth)
        return block.masked().sum() <= sum(map(block.quota, steps))

    def drafts(self, state: State, copies: list[Copy], logits, sequence):
        """The most probable states that may follow, by the logits of the forward that led to `state`.

        Yields rows to decide on. A draft is what the policy decides on the logits of the copy nearest to its state, or
        the same with one token replaced by the second choice there (greedy decoding alone). Returned without the blocks
        that are final by now.
        """
        found: list[Guess] = []
        first = yield from self.guess(state, 1.0, copies, logits, sequence)
        open_ = [first] if first else []
        while open_ and len(found) < self.depth:
            best = max(open_, key=lambda g: g.probability)
            open_.remove(best)
            found.append(best)
            if len(found) == self.depth:
                break
            child = yield from self.guess(best.state, best.probability, copies, logits, sequence)
            open_ += [g for g in (child, second_choice(best, sequence)) if g]
        return [[block.copy() for block in g.state[len(state) - 1 :]] for g in found]

    def guess(self, state: State, probability: float, copies: list[Copy], logits, sequence):
        """The likeliest state after `state`, None where the text ends or no copy has asked what it takes."""
        able = [copy for copy in copies if copy.has(state[-1], sequence)]
        if not able:
            return None
        source = min(able, key=lambda copy: copy.distance(state))
        block = state[-1].copy()
        masked = block.masked()
        row = source.row(block, draft=True)
        yield [row]
        places = (masked & ~block.masked()).nonzero()[0]
        probability *= float(np.prod(block.confidence[places]))
        decided = [*state[:-1], block]
        after = following(decided, sequence)
        if after is None:
            return None
        others = []
        if sequence.request.config.temperature == 0 and self.depth > 1 and len(places):
            top = logits.rows(row.logits[places]).softmax(-1).topk(2, dim=-1)
            ratio, token = (top.values[:, 1] / top.values[:, 0]).tolist(), top.indices[:, 1].tolist()
            others = sorted(zip(ratio, places.tolist(), token, strict=True), reverse=True)
        return Guess(after, decided, probability, others)


def second_choice(guess: Guess, sequence) -> Guess | None:
    """The same decision but for one token, the next in probability."""
    if guess.tried == len(guess.others):
        return None
    ratio, place, token = guess.others[guess.tried]
    block = guess.decided[-1].copy()
    block.tokens[place] = token
    decided = [*guess.decided[:-1], block]
    after = following(decided, sequence)
    if after is None:
        return None
    first = guess.others[guess.tried - 1][0] if guess.tried else 1.0
    return Guess(after, guess.decided, guess.probability / first * ratio, guess.others, guess.tried + 1)
