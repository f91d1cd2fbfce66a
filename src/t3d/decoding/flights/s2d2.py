import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from t3d.components import setting
from t3d.decoding.flight import Flight, Row, Segment, register
from t3d.decoding.policy import FILLED, SHADOW
from t3d.decoding.sampling import distribution
from t3d.decoding.speculation import first_run, propose, settle, verification
from t3d.errors import T3DError


@register("s2d2")
@dataclass(frozen=True)
class S2D2(Flight):
    """Verify a block's draft from left to right where that promises enough, else let the policy decide on it.

    Every denoising forward drafts the first run of masks. With H its entropies,
    E[K] = sum_j prod_(i <= j) exp(-T H_i / log V) estimates how many tokens a verifying forward would accept; it is
    made if E[K] - c is at least a bound. S2D2 (arXiv 2603.25702; SDAR/generate_ssd_policy.py with score_threshold,
    difference_static and soft_entropy_negexp).
    """

    verifies: ClassVar[bool] = True

    verify_cost: float = setting(1.0, "c: tokens that a verifying forward must be expected to bring", low=0)
    verify_from: float = setting(0.0, "verify where the expected tokens less `verify_cost` are at least this")
    verify_doubt: float = setting(1.0, "T: how much entropy lowers the tokens that are expected", low=0)

    def check(self, policy, config) -> None:
        if {FILLED, SHADOW} & policy.needs:
            raise T3DError(
                f"flight 's2d2' keeps what is committed, strategy {config.strategy!r} revises it; use another"
            )

    def scratch_blocks(self, policy) -> int:
        return 1  # a verifying forward carries the last block twice

    def run(self, sequence):
        block = sequence.new_block(sequence.at)
        while True:
            masked = block.masked()
            drafting = Segment(block.start, block.tokens.copy(), masked)
            logits = yield [drafting]
            places = first_run(masked)
            values = logits.rows(drafting.rows[places])
            if self.expected(values, sequence.request.config) - self.verify_cost >= self.verify_from:
                draft = propose(sequence, block, places, values)
                segments = verification(block, draft)
                logits = yield segments
                settle(sequence, block, draft, logits.rows(segments[1].rows[places]))
            else:
                yield [Row(block, np.where(sequence.window(block), drafting.rows, -1))]
            if block.full():
                sequence.finish(block)
                if block.end == sequence.request.end:
                    return
                block = sequence.new_block(block.end)

    def expected(self, logits: Tensor, config) -> float:
        """E[K] of a draft drawn from these logits (n, vocab); NaN, which verifies nothing, if they are not numbers."""
        temperature = config.temperature or 1.0  # a greedy draft's doubt is the model's own
        p = distribution(logits, temperature, config.top_k, config.top_p)
        entropy = -(p * p.clamp(min=1e-12).log()).sum(-1)
        alpha = (-self.verify_doubt / math.log(p.shape[1]) * entropy).exp()
        return float(alpha.cumprod(0).sum())
