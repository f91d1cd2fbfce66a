"""The queries of a forward as arrays of the whole batch, so that planning it costs little more for 128 than for one."""

from functools import cached_property
from itertools import chain

import numpy as np

from t3d.blocks import block_end
from t3d.decoding.flight import Segment
from t3d.engine.kv_cache import KVCache
from t3d.engine.query import Query


class Packing:
    """Queries one after the other. All arrays are int64.

    start, length, end (queries,): its first place, how many it has, and up to which it can see; first (queries,): its
    first packed token. query, place (tokens,): of each packed token. Pages that are read, in the order of the queries:
    page (n,), its holder (n,), and the index (n,) among its holder's pages.
    """

    def __init__(self, cache: KVCache, queries: list[Query]):
        self.cache, self.queries = cache, queries
        self.plain = all(query.plain for query in queries)
        about = [(q.start, q.length, q.sees) for q in queries]
        self.start, self.length, self.end = np.array(about, dtype=np.int64).reshape(-1, 3).T
        ends, numbers = self.length.cumsum(), np.arange(len(queries))
        self.first, self.tokens = ends - self.length, int(ends[-1]) if queries else 0
        self.query = numbers.repeat(self.length)
        self.place = np.arange(self.tokens) + (self.start - self.first).repeat(self.length)
        count = -(-self.end // cache.page_size)
        read = (q.sequence.pages[:n] for q, n in zip(queries, count.tolist(), strict=True))
        self.page = np.fromiter(chain.from_iterable(read), np.int64)
        self.pages = count.cumsum() - count  # those of the queries before
        self.holder = numbers.repeat(count)
        self.index = np.arange(len(self.page)) - self.pages.repeat(count)

    def positions(self) -> np.ndarray:
        """What rotations go by (tokens,): counted from the first token, so that no origin takes from the model's
        context. The places in the cache, but for segments behind the first."""
        found = self.place
        if not self.plain:
            found = found.copy()
            for query, first in zip(self.queries, self.first.tolist(), strict=True):
                place = first + query.final - query.start
                for segment in query.segments:
                    begin = segment.start - query.sequence.origin
                    found[place : place + len(segment)] = np.arange(begin, begin + len(segment))
                    place += len(segment)
        return found

    def slots(self) -> np.ndarray:
        """Row of the cache that each token has (tokens,)."""
        return self.cache.slots(self.page, self.place + self.pages[self.query] * self.cache.page_size)

    @cached_property
    def limits(self) -> np.ndarray:
        """How many places each token sees (tokens,), of the queries that are `plain`."""
        about = [(q.sequence.origin, q.sequence.request.span, q.sequence.request.final_block) for q in self.queries]
        origin, span, final_block = np.array(about, dtype=np.int64).reshape(-1, 3).T
        limits = block_end(self.place + origin[self.query], span[self.query]) - origin[self.query]
        if (causal := final_block != span).any():  # final tokens see those before them
            final = np.array([q.final for q in self.queries])
            alone = causal[self.query] & (self.place < final[self.query])
            limits[alone] = self.place[alone] + 1
        return np.minimum(limits, self.end[self.query])  # the last block may be short

    @cached_property
    def sight(self) -> np.ndarray:
        """What each token sees (4, tokens): see `t3d.blocks.visible`."""
        found = np.zeros((4, self.tokens), dtype=np.int64)
        found[0], found[3] = self.limits, -1
        if not self.plain:
            for query, first in zip(self.queries, self.first.tolist(), strict=True):
                if not query.plain:
                    found[:, first : first + query.length] = query.visible()
        return found

    def fill(self, queries: list[Query], shift: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids (tokens,), and which packed tokens have the logits that are wanted (n,), in the order of `queries`,
        which are those packed; every segment's `rows` then says where they are.

        shift: 0, the tokens that want them; 1, the ones before, of a segment's first token the last final one.
        """
        number = {id(query): n for n, query in enumerate(self.queries)}
        ids = np.empty(self.tokens, dtype=np.int64)
        segments: list[Segment] = []
        begins, behind = [], []  # packed token at which each segment begins; those behind others, and what they follow
        for query in queries:
            token = int(self.first[number[id(query)]])
            if query.final > query.start:
                last = token + query.final - query.start
                ids[token:last] = query.sequence.read(query.start, query.final)
                token = last
            last = token - 1
            for segment in query.segments:
                if token - 1 != last:
                    behind.append((len(segments), last))
                segments.append(segment)
                begins.append(token)
                token += len(segment)
        if not segments:
            return ids, np.zeros(0, dtype=np.int64)
        lengths = np.array([len(segment) for segment in segments])
        starts = lengths.cumsum() - lengths
        want = np.concatenate([segment.want for segment in segments])
        token = np.arange(len(want)) + (np.array(begins) - starts).repeat(lengths)
        ids[token] = np.concatenate([segment.ids for segment in segments])
        if shift:
            token -= shift
            for n, last in behind:
                token[starts[n]] = last
        rows = want.cumsum() * want - 1
        end = 0
        for segment in segments:
            begin, end = end, end + len(segment)
            segment.rows = rows[begin:end]
        return ids, token[want]
