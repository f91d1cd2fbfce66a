"""Who runs in the next forward. Requests wait in order; running ones keep their pages until they end or must yield."""

from collections import deque

from t3d.blocks import block_start
from t3d.decoding.flight import Segment
from t3d.engine.kv_cache import KVCache, Side
from t3d.engine.query import Query
from t3d.engine.request import Sequence


class Scheduler:
    """Continuous batching: a place that becomes free is given away in the same step.

    A sequence is admitted when the cache holds its prompt and first block, with a page to spare for every running
    sequence that can still grow. When a running one cannot grow, the youngest yields: its pages are freed and it waits
    in front, to be recomputed from its tokens. The oldest therefore always advances, and nothing is dropped. A guided
    sequence and its companion come, grow and go together. With the prefix cache, a sequence begins where the pages that
    it shares are filled, or will be by the queries before its own in the same forward.

    shift: of the model's logits; with 1 every denoising query begins with the last final token, which predicts the
    first one behind it, and computes it again where it is cached.
    """

    def __init__(self, cache: KVCache, max_batch_size: int, prefill_tokens: int, fused: bool, shift: int = 0):
        self.cache, self.shift = cache, shift
        self.max_batch_size = max_batch_size
        self.prefill_tokens = prefill_tokens
        self.fused = fused
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self._coming: dict[int, int] = {}  # page -> places of it that are final after the forward being planned
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or is no longer wanted: its pages are free at once."""
        self._release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def plan(self) -> tuple[list[Query], list[Query]]:
        """The queries of the next forward, and those of companions; empty only when nothing is left to do."""
        self._make_room()
        self._admit()
        self.cache.compact()
        queries, companions, budget = [], [], self.prefill_tokens
        self._coming = {}
        for sequence in self.running:
            for query in self._queries(sequence, budget):
                (queries if query.sequence is sequence else companions).append(query)
                budget -= self._cost(sequence, query.final - query.start)
        return queries, companions

    def _make_room(self) -> None:
        for sequence in list(self.running):
            if sequence not in self.running:  # it has yielded to an older one
                continue
            while not self._grow(sequence):
                youngest = self.running.pop()
                self._release(youngest)
                youngest.preemptions += 1
                self.preemptions += 1
                self.waiting.appendleft(youngest)
                if youngest is sequence:
                    break

    def _admit(self) -> None:
        if not self.waiting or len(self.running) >= self.max_batch_size:
            return
        can_grow = sum(map(self._can_grow, self.running))
        while self.waiting and len(self.running) < self.max_batch_size:
            sequence = self.waiting[0]
            for side in sequence.sides:
                self.cache.attach(side)
            if not self._grow(sequence, spare=can_grow):
                self._release(sequence)
                break
            for side in sequence.sides:
                self.cache.publish(side)
            can_grow += self._can_grow(sequence)
            self.running.append(self.waiting.popleft())

    def _grow(self, sequence: Sequence, spare: int = 0) -> bool:
        """Give it and its companion pages for the next forward; False, and nothing taken, if that leaves too few."""
        missing = sum(self.cache.missing(side, side.places) for side in sequence.sides)
        if not missing + spare:
            return True
        return missing + spare <= self.cache.free_pages and all(self.cache.grow(s, s.places) for s in sequence.sides)

    def _can_grow(self, sequence: Sequence) -> int:
        """How many of it and its companion may need a page more."""
        return sum(self.cache.missing(side, side.most_places) > 0 for side in sequence.sides)

    def _release(self, sequence: Sequence) -> None:
        for side in sequence.sides:
            self.cache.release(side)

    def _cost(self, sequence: Sequence, final: int) -> int:
        """What a forward with so many final tokens takes of the budget: every one may carry, free of charge, the blocks
        that the last one may have finished."""
        config = sequence.request.config
        return max(0, final - config.flying.most_final * config.block_size)

    def _queries(self, sequence: Sequence, budget: int) -> list[Query]:
        """What this sequence does next: denoise, together with all that is not cached yet if `budget` allows.

        Its companion does the same in the same forward; while only one of them has a prompt left to read, it alone.
        """
        block, sides = sequence.request.config.block_size, sequence.sides
        pending = [side.base - self._reach(side) for side in sides]
        if not any(pending) or (self.fused and sum(self._cost(sequence, n) for n in pending) <= budget):
            return [self._query(side, side.base, side.asked, counted=side is sequence) for side in sides]
        queries: list[Query] = []
        for side in sides:
            start = self._reach(side)
            left = side.base - start
            if left == 0 or (budget <= 0 and left > block):
                continue
            whole = block_start(budget, block) + block - (start + side.origin) % block
            queries.append(self._query(side, start + min(left, whole), [], counted=not queries))
            budget -= self._cost(sequence, min(left, whole))
        return queries

    def _reach(self, side: Side) -> int:
        return self.cache.reach(side, self._coming)

    def _query(self, side: Side, final: int, segments: list[Segment], counted: bool) -> Query:
        start = self._reach(side)
        if segments and self.shift:
            start = max(min(start, final - self.shift), 0)
        query = Query(side, start, final, segments, counted)
        self._coming |= self.cache.extents(query)
        return query
