"""Who runs in the next forward. Requests wait in order; running ones keep their pages until they end or must yield."""

from collections import deque

from t3d.blocks import block_start
from t3d.engine.kv_cache import KVCache
from t3d.engine.request import Query, Sequence


class Scheduler:
    """Continuous batching: a place that becomes free is given away in the same step.

    A sequence is admitted when the cache holds its prompt and first block, with a page to spare for every running
    sequence that can still grow. When a running one cannot grow, the youngest yields: its pages are freed and it waits
    in front, to be recomputed from its tokens. The oldest therefore always advances, and nothing is dropped.
    """

    def __init__(self, cache: KVCache, max_batch_size: int, prefill_tokens: int, fused: bool):
        self.cache = cache
        self.max_batch_size = max_batch_size
        self.prefill_tokens = prefill_tokens
        self.fused = fused
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or is no longer wanted: its pages are free at once."""
        self.cache.release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def plan(self) -> list[Query]:
        """The queries of the next forward; empty only when nothing is left to do."""
        self._make_room()
        self._admit()
        self.cache.compact()
        queries, budget = [], self.prefill_tokens
        for sequence in self.running:
            query = self._query(sequence, budget)
            if query is not None:
                queries.append(query)
                budget -= max(0, query.final - query.start - self._free_of_charge(sequence))
        return queries

    def _make_room(self) -> None:
        for sequence in list(self.running):
            if sequence not in self.running:  # it has yielded to an older one
                continue
            while not self.cache.grow(sequence, sequence.places):
                youngest = self.running.pop()
                self.cache.release(youngest)
                youngest.preemptions += 1
                self.preemptions += 1
                self.waiting.appendleft(youngest)
                if youngest is sequence:
                    break

    def _admit(self) -> None:
        can_grow = sum(self.cache.missing(s, s.request.most_places) > 0 for s in self.running)
        while self.waiting and len(self.running) < self.max_batch_size:
            sequence = self.waiting[0]
            if self.cache.missing(sequence, sequence.places) + can_grow > self.cache.free_pages:
                break
            self.cache.grow(sequence, sequence.places)
            can_grow += self.cache.missing(sequence, sequence.request.most_places) > 0
            self.running.append(self.waiting.popleft())

    def _free_of_charge(self, sequence: Sequence) -> int:
        """Final tokens that every forward may carry: the blocks that the last one may have finished."""
        config = sequence.request.config
        return config.flying.most_final * config.block_size

    def _query(self, sequence: Sequence, budget: int) -> Query | None:
        """What this sequence does next: denoise, together with all that is not cached yet if `budget` allows."""
        block = sequence.request.config.block_size
        pending = sequence.base - sequence.cached
        if pending == 0 or (self.fused and pending <= budget + self._free_of_charge(sequence)):
            return Query(sequence, sequence.cached, sequence.base, sequence.asked)
        chunk = min(pending, block_start(budget, block) + block)
        if budget <= 0 and pending > block:
            return None
        return Query(sequence, sequence.cached, sequence.cached + chunk, [])
