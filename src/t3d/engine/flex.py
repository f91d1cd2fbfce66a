"""Attention of a batch of spans over the paged cache, with PyTorch's FlexAttention: one call per layer, no copy.

The batch is one row of packed queries against the arena; a block mask names, for each tile of queries, the pages of the
sequences in it, so that only these are read. Compiled on a GPU; elsewhere eager, which is slow and serves the tests.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from t3d.engine.attention import limits, to_device
from t3d.engine.kv_cache import KVCache
from t3d.engine.request import Span

_TILE = 128  # queries per tile
_compiled = None


class FlexAttention:
    """Made once per forward from its spans, called once per layer; `order` is how the spans must be packed."""

    page_size = 128  # a page is a tile of keys

    def __init__(self, cache: KVCache, spans: list[Span], groups: int, dtype: torch.dtype):
        self.cache, self.order, self.grouped = cache, spans, groups > 1
        device, size = cache.data.device, cache.page_size
        tokens, pages = sum(s.length for s in spans), cache.used_pages
        tiles = -(-tokens // _TILE)
        owner = np.full(pages, -1, dtype=np.int64)  # page -> span
        first = np.zeros(pages, dtype=np.int64)  # page -> position of its first key
        reads: list[list[int]] = [[] for _ in range(tiles)]  # tile -> pages
        token = 0
        for number, span in enumerate(spans):
            held = span.sequence.pages[: -(-span.end // size)]
            owner[held] = number
            first[held] = np.arange(len(held)) * size
            for tile in range(token // _TILE, (token + span.length - 1) // _TILE + 1):
                reads[tile] += held
            token += span.length
        indices = np.zeros((tiles, pages), dtype=np.int32)
        for tile, held in enumerate(reads):
            indices[tile, : len(held)] = sorted(held)
        counts = np.array([len(held) for held in reads], dtype=np.int32)
        span_of = to_device(np.repeat(np.arange(len(spans)), [s.length for s in spans]), device)
        limit = to_device(np.concatenate([limits(s) for s in spans]), device)
        owner, first = to_device(owner, device), to_device(first, device)

        def sees(row, head, q, k):
            page = k // size
            return (owner[page] == span_of[q]) & (first[page] + k % size < limit[q])

        self.keys = pages * size
        self.mask = BlockMask.from_kv_blocks(
            to_device(counts, device)[None, None],
            to_device(indices, device)[None, None],
            BLOCK_SIZE=(_TILE, size),
            mask_mod=sees,
            seq_lengths=(tokens, self.keys),
        )

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """q: (tokens, heads, head_dim), packed in `order`; returns the same shape. The keys are in the cache."""
        kv = self.cache.data[layer][: self.keys].permute(1, 2, 0, 3)[:, None]  # (2, 1, kv_heads, keys, head_dim)
        attend = _compile() if q.is_cuda else flex_attention
        out = attend(q.transpose(0, 1)[None], kv[0], kv[1], block_mask=self.mask, enable_gqa=self.grouped)
        return out[0].transpose(0, 1)


def _compile():
    global _compiled
    _compiled = _compiled or torch.compile(flex_attention)
    return _compiled
