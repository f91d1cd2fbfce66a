from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from t3d.decoding.flight import Flight, Segment, register
from t3d.decoding.speculation import Draft, propose, settle, verification


@register("linear_spec")
@dataclass(frozen=True)
class LinearSpec(Flight):
    """Draft what is left of a block at once, keep what the token-by-token decoder would have given, and draft again.

    The tokens are exactly those of the model with blocks of one token: final tokens see only those before them, and
    every token is verified. Two forwards per round, one where a single mask is left, which needs no draft. `strategy`,
    `steps` and `window` have no effect. Follows LinearSpec of sglang (linear_spec.py).
    """

    causal: ClassVar[bool] = True
    verifies: ClassVar[bool] = True

    def scratch_blocks(self, policy) -> int:
        return 1  # a verifying forward carries the last block twice

    def run(self, sequence):
        block = sequence.new_block(sequence.at)
        while True:
            places = block.masked().nonzero()[0]  # always the block's end
            if len(places) > 1:
                segment = Segment(block.start, block.tokens.copy(), block.masked())
                logits = yield [segment]
                draft = propose(sequence, block, places, logits.rows(segment.rows[places]))
            else:
                draft = Draft(places, np.array([block.mask_id]))
            segments = verification(block, draft)
            logits = yield segments
            settle(sequence, block, draft, logits.rows(segments[1].rows[places]))
            if block.full():
                sequence.finish(block)
                if block.end == sequence.request.end:
                    return
                block = sequence.new_block(block.end)
