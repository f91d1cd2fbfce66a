"""What one sequence contributes to one forward of the model."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from t3d.blocks import Rule, visible
from t3d.decoding.flight import Segment

if TYPE_CHECKING:
    from t3d.engine.guidance import Companion
    from t3d.engine.request import Sequence


@dataclass(eq=False)
class Query:
    """Consecutive places of one sequence in one forward: final tokens `start .. final` that the cache lacks, and the
    segments that the sequence's flight asks for, in the places behind them.

    Prefill, commit and denoise are the same work; with `segments` the forward denoises.
    """

    sequence: "Sequence | Companion"
    start: int
    final: int
    segments: list[Segment]
    counted: bool = True  # this forward of the sequence is not counted by another query

    def __post_init__(self):
        self.end = self.final + sum(map(len, self.segments))

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def sees(self) -> int:
        """Places up to which its tokens can see: its own end, or that of keys which it leaves as they are."""
        return max(self.end, self.sequence.kept)

    @property
    def denoise(self) -> bool:
        return bool(self.segments)

    @property
    def verify(self) -> bool:
        return any(segment.rule is Rule.NEXT for segment in self.segments)

    @cached_property
    def steady(self) -> bool:
        """Whether it is no longer than a forward of steady decoding, so that shapes repeat."""
        config = self.sequence.request.config
        return self.final - self.start <= (config.flying.most_final if self.segments else 2) * config.block_size

    @cached_property
    def plain(self) -> bool:
        """Whether every token sees all places up to the end of its block, and has the position of its place."""
        return not self.segments or (len(self.segments) == 1 and self.segments[0].rule is Rule.BLOCK)

    def visible(self) -> np.ndarray:
        """What each of its tokens sees, int64 (4, length): see `t3d.blocks.visible`."""
        request, position = self.sequence.request, self.start + self.sequence.origin
        block = request.span
        final = visible(Rule.BLOCK, 0, self.start, position, self.final - self.start, request.final_block)
        parts, place = [final], self.final
        parts[0][1] = 0  # from the beginning
        places = {}
        for segment in self.segments:
            of = 0 if segment.of is None else places[id(segment.of)]
            parts.append(visible(segment.rule, self.final, place, segment.start, len(segment), block, of))
            places[id(segment)] = place
            place += len(segment)
        return np.concatenate(parts, axis=1)
