from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from t3d.decoding.flight import Flight, Segment, register
from t3d.decoding.flights.multi_block import ask, complete, row


@register("next_token")
@dataclass(frozen=True)
class NextToken(Flight):
    """One block after the other, whose first token is the likeliest by the forward that ends the block before.

    For models whose logits predict the next token: what the last final token predicts saw no mask. It is taken whatever
    its confidence, as Fast-dLLM v2 does (arXiv 2509.26328, generate of its checkpoints).
    """

    shifted: ClassVar[bool] = True

    def run(self, sequence):
        block = sequence.new_block(sequence.at)
        while True:
            if not block.fixed[0]:
                first = Segment(block.start, block.tokens[:1].copy(), np.ones(1, dtype=bool))
                logits = yield [first]
                values = logits.rows(first.rows)
                probability, token = (x.cpu().numpy() for x in values.softmax(-1).max(-1))
                sequence.commit_at(block, np.zeros(1, dtype=np.int64), token, probability, values)
            while not complete(block, sequence.policy):
                segments = ask([block], sequence)
                yield segments
                yield [row(block, segments)]
            sequence.finish(block)
            if block.end == sequence.request.end:
                return
            block = sequence.new_block(block.end)
