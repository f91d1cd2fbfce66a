from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from t3d.blocks import Rule
from t3d.components import setting
from t3d.decoding.flight import Block, Flight, Row, Segment, register
from t3d.decoding.policy import FILLED, SHADOW
from t3d.errors import T3DError


def ask(blocks: list[Block], sequence) -> list[Segment]:
    """Consecutive blocks as a segment, each of which sees the ones before it, and what the policy asks for besides."""
    needs = sequence.policy.needs
    ids = _joined([b.tokens for b in blocks])
    want = _joined([~b.fixed if FILLED in needs else sequence.window(b) for b in blocks])
    whole = sequence.canvas(Segment(blocks[0].start, ids, want))
    if SHADOW not in needs:
        return [whole]
    filled = (ids != sequence.mask_id) & ~np.concatenate([b.fixed for b in blocks])
    return [whole, Segment(whole.start, np.full_like(ids, sequence.mask_id), filled, Rule.EXCEPT, of=whole)]


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0].copy()


def row(block: Block, segments: list[Segment], **about) -> Row:
    """The row of a block that `ask` asked for."""
    first = block.start - segments[0].start
    mine = slice(first, first + len(block.tokens))
    shadow = segments[1].rows[mine] if len(segments) > 1 else None
    return Row(block, segments[0].rows[mine], shadow=shadow, **about)


def without(block: Block, places: np.ndarray) -> Segment:
    """A copy of the block in which these places are masked too."""
    ids = block.tokens.copy()
    ids[places] = block.mask_id
    return Segment(block.start, ids, ids == block.mask_id)


def complete(block: Block, policy) -> bool:
    """Nothing is masked and, where the policy looks at filled places too, nothing changed any more."""
    return block.full() and not (FILLED in policy.needs and block.changed)


@register("multi_block")
@dataclass(frozen=True)
class MultiBlock(Flight):
    """Up to `blocks_in_flight` consecutive blocks are noisy at once; one is the ordinary decoder.

    Each block sees everything final, itself and the noisy ones before it. The next one enters when `enter` of the last
    one is decided; a block must advance if it is the first, or `force` of the one before is decided. A block is final
    when it is complete and all before it are. MultiBD of MBD-LMs (arXiv 2606.29215) and Diffulex (dllm_block.py); with
    `force` above 1 and the policy entropy_threshold, d3LLM (arXiv 2601.07568, generate_multi_block).

    Ours: with `recheck`, what is decided behind other blocks is provisional. The forward after a block has become the
    first carries a copy of it with those places masked; tokens that are less probable there are masked again.
    """

    full_attention: ClassVar[bool] = True

    blocks_in_flight: int = setting(1, "blocks of a sequence decoded at once; 1: one after the other", low=1, high=64)
    enter: float = setting(0.1, "share of the last block that is decided before the next enters", low=0, high=1)
    force: float = setting(
        0.25, "share of the block before that is decided before a block must advance; above 1: only the first", low=0
    )
    recheck: float = setting(
        0.0, "probability below which a block that has become the first masks its tokens again; 0: none", low=0, high=1
    )

    @property
    def label(self) -> str:
        if self.blocks_in_flight == 1:
            return ""
        usual = self == MultiBlock(self.blocks_in_flight, recheck=self.recheck)
        return (
            f"{self.blocks_in_flight} blocks"
            + ("" if usual else f" ({self.enter:g}, {self.force:g})")
            + (f", recheck {self.recheck:g}" if self.recheck else "")
        )

    @property
    def used(self) -> set[str]:
        return {"blocks_in_flight"} if self.blocks_in_flight == 1 else super().used

    @property
    def most_final(self) -> int:
        return self.blocks_in_flight

    def scratch_blocks(self, policy) -> int:
        if SHADOW in policy.needs:
            return self.blocks_in_flight
        return 1 if self.recheck and self.blocks_in_flight > 1 else 0

    def check(self, policy, config) -> None:
        if self.recheck and {FILLED, SHADOW} & policy.needs:
            raise T3DError(f"recheck masks tokens again, and so does strategy {config.strategy!r}; use one of them")

    def must(self, blocks: list[Block], depth: int) -> bool:
        return depth == 0 or blocks[depth - 1].progress >= self.force

    def run(self, sequence):
        policy, blocks = sequence.policy, [sequence.new_block(sequence.at)]
        provisional = np.zeros(0, dtype=np.int64)  # places of the first block
        while True:
            segments = ask(blocks, sequence)
            copies = [without(blocks[0], provisional)] if len(provisional) else []
            logits = yield segments + copies
            reopened = bool(copies) and self.reopen(blocks[0], provisional, copies[0], logits, sequence)
            rows = [
                row(
                    block,
                    segments,
                    depth=depth,
                    progress=blocks[depth - 1].progress if depth else 1.0,
                    must=self.must(blocks, depth),
                )
                for depth, block in enumerate(blocks)
                if not complete(block, policy)
            ]
            if reopened:
                rows[0] = Row(blocks[0], np.where(sequence.window(blocks[0]), copies[0].rows, -1))
            if rows:
                yield rows
            provisional = provisional[:0]
            while blocks and complete(blocks[0], policy) and not len(provisional):
                sequence.finish(blocks.pop(0))
                if blocks and self.recheck:
                    provisional = (~blocks[0].masked() & ~blocks[0].fixed).nonzero()[0]
            if not blocks and sequence.at >= sequence.request.end:
                return
            while len(blocks) < self.blocks_in_flight and self.enters(blocks, sequence):
                blocks.append(sequence.new_block(blocks[-1].end if blocks else sequence.at))

    def reopen(self, block: Block, places: np.ndarray, copy: Segment, logits, sequence) -> bool:
        """Mask those of the places again whose tokens are improbable in the copy; whether there are any."""
        p = logits.rows(copy.rows[places]).softmax(-1).cpu().numpy()
        wrong = places[p[np.arange(len(places)), block.tokens[places]] < self.recheck]
        if len(wrong):
            sequence.reopen(block, wrong)
        return len(wrong) > 0

    def enters(self, blocks: list[Block], sequence) -> bool:
        if not blocks:
            return True
        last = blocks[-1]
        if last.end >= sequence.request.end or last.progress < self.enter:
            return False
        stops = sequence.request.config.stop_ids  # behind one nothing counts
        return not any(np.isin(b.tokens[~b.fixed], stops).any() for b in blocks)
