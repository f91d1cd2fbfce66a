"""Classifier-free guidance: what a guided sequence has beside it, and how the logits of both become one."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from t3d.decoding.flight import Segment
from t3d.engine.query import Query
from t3d.engine.request import Request, Sequence


def guide(values: Tensor, queries: list[Query], companions: list[Query]) -> Tensor:
    """Classifier-free guidance: the logits of the queries, those of guided sequences changed in place.

    values: float32 (n, vocab), of the queries and then of the companions. With c and u the logits with and without the
    question, `u + (scale + 1) * (c - u)` (LLaDA, arXiv 2502.09992).
    """
    device, other = values.device, _rows(companions)
    guided = [q for q in queries if q.sequence.request.guided]
    index, scales = torch.from_numpy(_rows(guided)).to(device), []
    for query in guided:
        scales += [query.sequence.request.config.guidance_scale] * int(sum(s.want.sum() for s in query.segments))
    c, u = values[index], values[torch.from_numpy(other).to(device)]
    values[index] = u + (torch.tensor(scales, device=device)[:, None] + 1) * (c - u)
    return values[: len(values) - len(other)]


def _rows(queries: list[Query]) -> np.ndarray:
    """Rows of the logits of these queries' segments, int64."""
    rows = [segment.rows for query in queries for segment in query.segments]
    found = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return found[found >= 0]


@dataclass(eq=False)
class Companion:
    """The other condition of a guided sequence: another prompt, the same response in every forward, pages of its own.

    Its prompt is masked or a negative one, which may be of another length. So that the response lies in blocks as the
    sequence's does, its first token has a position inside the first block, `origin`; places count from that token. All
    that a sequence is asked about a query, a companion is too.
    """

    sequence: Sequence
    prompt: np.ndarray = field(init=False)  # int64
    origin: int = field(init=False)
    shift: int = field(init=False)  # places of the response, counted from the sequence's
    cached: int = 0
    pages: list[int] = field(default_factory=list)

    def __post_init__(self):
        request = self.request
        self.prompt = np.full(request.companion_length, self.sequence.mask_id, dtype=np.int64)
        if request.negative_ids is not None:
            self.prompt[:] = request.negative_ids
        self.origin = request.companion_origin
        self.shift = request.companion_length - len(request.prompt_ids)

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def kept(self) -> int:
        return self.sequence.kept

    @property
    def ended(self) -> bool:
        return self.sequence.ended

    @property
    def failed(self) -> bool:
        return self.sequence.failed

    @property
    def root(self) -> tuple[int, int, int]:
        return self.sequence.weights, self.request.final_block, self.origin

    @property
    def base(self) -> int:
        """Places that are final. A prompt shorter than the sequence's begins inside its first block not final."""
        return max(0, self.sequence.base + self.shift)

    @property
    def asked(self) -> list[Segment]:
        """The sequence's, with this prompt in the place of its own; what lies before the origin is left out."""
        mirrored: dict[int, Segment] = {}
        for segment in self.sequence.asked:
            place = segment.start - self.sequence.origin + self.shift
            cut = min(max(0, -place), len(segment))
            place += cut
            ids, want = segment.ids[cut:].copy(), segment.want[cut:]
            own = self.prompt[place : place + len(ids)]
            ids[: len(own)] = own
            of = None if segment.of is None else mirrored[id(segment.of)]
            mirrored[id(segment)] = replace(segment, start=place + self.origin, ids=ids, want=want, of=of, rows=None)
        return list(mirrored.values())

    @property
    def places(self) -> int:
        return self.base + sum(map(len, self.asked))

    @property
    def most_places(self) -> int:
        return self.request.most_each[1]

    def read(self, start: int, end: int) -> np.ndarray:
        n = len(self.prompt)
        response = self.sequence.read(max(start, n) - self.shift, max(end, n) - self.shift)
        return np.concatenate([self.prompt[start:end], response])

    def advance(self, query: Query) -> None:
        if query.counted:
            self.sequence.count(query, query.start < self.request.prompt_places + self.shift)
        self.cached = query.final
