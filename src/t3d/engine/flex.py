"""Attention of a batch of queries over the paged cache, with PyTorch's FlexAttention: one call per layer, no copy.

The batch is one row of packed queries against the arena; a block mask names, for each tile of queries, the pages of the
sequences in it, so that only these are read. Compiled on a GPU; elsewhere eager, which is slow and serves the tests.
"""

from functools import cache as cached

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from t3d.engine.attention import to_device
from t3d.engine.kv_cache import KVCache
from t3d.engine.packing import Packing
from t3d.engine.query import Query

_TILE = 128  # queries per tile


def in_order(queries: list[Query]) -> list[Query]:
    """Ordered so that those who hold a page are neighbours: who holds one also holds all pages before it."""
    return sorted(queries, key=lambda query: query.sequence.pages)


def page_plan(packing: Packing, tokens: int, pages: int) -> dict[str, np.ndarray]:
    """Which pages each tile of queries reads, and what each query may see there; int64, padded to `tokens` and `pages`.

    packing: of queries `in_order`. counts (tiles,), indices (tiles, pages): the pages of a tile. holders (2, pages):
    the first and the last query that holds a page, 0 and -1 for none; first (pages,): place of its first key. query_of
    (tokens,): the query of each token, -2 for padding, which sees nothing; sight (4, tokens): what it sees of the
    places of its sequence, see `t3d.blocks.visible`.
    """
    tiles, page, holder = -(-tokens // _TILE), packing.page, packing.holder
    plan = {
        "counts": np.zeros(tiles, dtype=np.int64),
        "indices": np.zeros((tiles, pages), dtype=np.int64),
        "holders": np.repeat(np.array([[0], [-1]]), pages, axis=1),
        "first": np.zeros(pages, dtype=np.int64),
        "query_of": np.full(tokens, -2, dtype=np.int64),
        "sight": np.zeros((4, tokens), dtype=np.int64),
    }
    # of several values for one place the last remains
    plan["holders"][0, page[::-1]], plan["holders"][1, page] = holder[::-1], holder
    plan["first"][page] = packing.index * packing.cache.page_size
    plan["query_of"][: packing.tokens] = packing.query
    plan["sight"][:, : packing.tokens] = packing.sight
    # every tile with every page of every query in it
    tile = packing.first // _TILE
    spans = ((packing.first + packing.length - 1) // _TILE - tile + 1)[holder]
    more = np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans)
    tile, page = np.divmod(np.unique((np.repeat(tile[holder], spans) + more) * pages + np.repeat(page, spans)), pages)
    plan["counts"] += np.bincount(tile, minlength=tiles)
    plan["indices"][tile, np.arange(len(tile)) - np.searchsorted(tile, tile)] = page
    return plan


class PagedFlex:
    """FlexAttention by a plan on the device, `{name: tensor}` of `page_plan`. Called once per layer."""

    def __init__(self, cache: KVCache, plan: dict[str, Tensor], groups: int, steady: bool = False):
        self.cache, self.grouped, self.steady = cache, groups > 1, steady
        # PyTorch's kernel for fewer than 128 queries takes all of them with all heads of a group at once, and has no
        # form for more than a tile of these; nor is it made for many
        many = len(plan["query_of"]) * groups > _TILE // 2
        self.options = {"FORCE_USE_FLEX_ATTENTION": True} if many else None
        size, first, query_of = cache.page_size, plan["first"], plan["query_of"]
        one, last = plan["holders"]
        low, start, end, hole = plan["sight"]
        self.keys = len(first) * size

        def sees(row, head, q, k):
            page = k // size
            place = first[page] + k % size
            seen = (place < low[q]) | ((place >= start[q]) & (place < end[q]))
            return (one[page] <= query_of[q]) & (query_of[q] <= last[page]) & seen & (place != hole[q])

        self.mask = BlockMask.from_kv_blocks(
            plan["counts"].to(torch.int32)[None, None],
            plan["indices"].to(torch.int32)[None, None],
            BLOCK_SIZE=(_TILE, size),
            mask_mod=sees,
            seq_lengths=(len(query_of), self.keys),
            compute_q_blocks=False,  # only a backward pass needs them
        )

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """q: (tokens, heads, head_dim), packed in order of the queries; the same shape. The keys are in the cache."""
        kv = self.cache.data[layer][: self.keys].permute(1, 2, 0, 3)[:, None]  # (2, 1, kv_heads, keys, head_dim)
        attend = _compiled(self.steady) if q.is_cuda else flex_attention
        settings = {"block_mask": self.mask, "enable_gqa": self.grouped, "kernel_options": self.options}
        out = attend(q.transpose(0, 1)[None], kv[0], kv[1], **settings)
        return out[0].transpose(0, 1)


class FlexAttention(PagedFlex):
    """Made once per forward from its queries; `order` is how the queries must be packed."""

    page_size = 128  # a page is a tile of keys

    def __init__(self, cache: KVCache, queries: list[Query], groups: int, dtype: torch.dtype):
        self.order = in_order(queries)
        self.packing = Packing(cache, self.order)
        plan = page_plan(self.packing, self.packing.tokens, cache.used_pages)
        super().__init__(cache, {name: to_device(array, cache.data.device) for name, array in plan.items()}, groups)


@cached
def _compiled(steady: bool):
    """The kernel for few shapes that come again and again, each compiled for itself, or for any shape."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)  # beyond which it raises: more than there are shapes
    return torch.compile(flex_attention, fullgraph=True, dynamic=not steady)
