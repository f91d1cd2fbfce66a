"""Attention of a batch of queries over the paged cache, with PyTorch's SDPA, reading the cache where it lies.

Queries of steady decoding go through one batched call per layer, a page being a batch row; where sequences have several
pages, each page gives a partial softmax and the parts are merged. A page that several rows share is attended to once
for each of them, from a copy but for the first. Longer ones (prefill) go one by one. Who sees whom is
`Packing.limits`: the first so many places, since the keys of a query are written to the cache before anything reads it;
or `Query.visible`, where a query carries more than one segment.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t3d.engine.kv_cache import KVCache
from t3d.engine.packing import Packing
from t3d.engine.query import Query

_FAR = np.iinfo(np.int64).max // 2


class SDPAttention:
    """Made once per forward from its queries, called once per layer.

    `order` is how the queries must be packed: those of the batched call first, in the order of their rows.
    """

    page_size = None  # a page may be of any size; a whole sequence is best

    def __init__(self, cache: KVCache, queries: list[Query], groups: int, dtype: torch.dtype):
        self.cache, self.groups, self.device = cache, groups, cache.data.device
        self.paged = any(len(q.sequence.pages) > 1 for q in queries)
        short = [q for q in queries if q.steady]
        self.long = [q for q in queries if not q.steady]
        short.sort(key=lambda q: q.sequence.pages[0])
        self.order = short + self.long
        self.packing = Packing(cache, self.order)
        self.short_tokens = int(self.packing.length[: len(short)].sum())
        if short:
            self._plan_rows(len(short), dtype)
        self._plan_long(dtype)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)

    def _plan_rows(self, short: int, dtype: torch.dtype) -> None:
        """Rows of the batched call, for the first queries: one for each, or one per page in use where each sequence has
        one page."""
        pages, size, packing = self.cache.used_pages, self.cache.page_size, self.packing
        held = int(packing.pages[short]) if self.long else len(packing.page)
        page, holder, index = packing.page[:held], packing.holder[:held], packing.index[:held]
        query, width = packing.query[: self.short_tokens], int(packing.length[:short].max())
        rows = short if self.paged else pages
        row = query if self.paged else page[query]  # of each token
        column = packing.place[: self.short_tokens] - packing.start[query]
        self.rows, self.width, self.pages = rows, width, pages
        self.longest = min(int(packing.end[:short].max()), size)
        self.grid = self.places = self.shared = None
        if self.short_tokens < rows * width:  # not every row is full, so packing is no reshape
            grid = np.zeros((rows, width), dtype=np.int64)  # -> packed token; unused places repeat token 0
            grid[row, column] = np.arange(self.short_tokens)
            self.grid, self.places = self._tensor(grid.ravel()), self._tensor(row * width + column)
        # what is seen of each row's places (see `blocks.visible`), or, where that says it all, of how many of the
        # first; unused places see everything: finite, and dropped
        plain = all(query.plain for query in self.order[:short])
        sight = np.full((1 if plain else 4, rows, width), _FAR)
        if plain:
            sight[0, row, column] = packing.limits[: self.short_tokens]
        else:
            sight[3] = -1
            sight[:, row, column] = packing.sight[:, : self.short_tokens]
        if self.paged:
            # a part is a page seen by a row: all pages in use, then the shared ones once more for every further row
            again = np.ones(held, dtype=bool)
            again[np.unique(page, return_index=True)[1]] = False
            shared, part = page[again], page.copy()
            part[again] = pages + np.arange(len(shared))
            owner = np.zeros(pages + len(shared), dtype=np.int64)  # part -> row
            first = np.zeros_like(owner)  # part -> position of its first key
            owner[part], first[part] = holder, index * size
            table = np.zeros((rows, int(index.max()) + 1), dtype=np.int64)
            absent = np.ones(table.shape, dtype=bool)
            # absent ones have weight 0; another sequence's NaN would not be stopped by that
            table[:] = part[index == 0][:, None]
            table[holder, index], absent[holder, index] = part, False
            self.owner, self.table = self._tensor(owner), self._tensor(table)
            self.absent = self._tensor(absent)[:, :, None, None]
            self.shared = self._tensor(shared) if len(shared) else None
            hole = sight[3:, owner]
            sight = sight[:, owner] - first[:, None]  # (1 or 4, parts, width), counted from each page's first key
            sight[3:] = np.where(hole < 0, -1, sight[3:])
        self.mask = None
        if plain and (sight >= self.longest).all():
            return
        key = torch.arange(self.longest, device=self.device)
        seen = self._tensor(sight)[..., None]
        hidden = key >= seen[0] if plain else _hidden(seen, key)
        # finite, so that a query that sees nothing of a page gives weight 0 in the merge and no NaN
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
        mask.masked_fill_(hidden, torch.finfo(dtype).min / 2)
        self.mask = mask.repeat_interleave(self.groups, dim=1)[:, None]  # (parts, 1, width * groups, longest)

    def _plan_long(self, dtype: torch.dtype) -> None:
        self.long_plans = []
        for query, token in zip(self.long, self.packing.first[-len(self.long) :].tolist(), strict=bool(self.long)):
            key = torch.arange(query.sees, device=self.device)
            if query.plain:
                hidden = (
                    key >= self._tensor(self.packing.limits[token : token + query.length])[:, None]
                )  # (length, end)
            else:
                hidden = _hidden(self._tensor(query.visible())[..., None], key)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            pages = np.array(query.sequence.pages)
            slots = self._tensor(self.cache.slots(pages, np.arange(query.sees))) if self.paged else None
            first = query.sequence.pages[0] * self.cache.page_size
            self.long_plans.append((query, mask.repeat_interleave(self.groups, dim=0), slots, first))

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """q: (tokens, heads, head_dim), packed in `order`; returns the same shape. The keys are in the cache."""
        tokens, heads, dim = q.shape
        kv_heads = heads // self.groups
        if self.short_tokens == tokens:
            return self._rows(layer, q, kv_heads, dim).view(tokens, heads, dim)
        out = torch.empty_like(q)
        if self.short_tokens:
            out[: self.short_tokens] = self._rows(layer, q, kv_heads, dim).view(-1, heads, dim)
        token = self.short_tokens
        for query, mask, slots, first in self.long_plans:
            n = query.length
            kv = self.cache.data[layer]
            kv = kv[first : first + query.sees] if slots is None else kv[slots]  # (end, 2, kv_heads, dim)
            kv = kv.permute(1, 2, 0, 3)[:, None]
            mine = (
                q[token : token + n].view(n, kv_heads, self.groups, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)
            )
            mine = F.scaled_dot_product_attention(mine, kv[0], kv[1], attn_mask=mask)
            out[token : token + n] = mine.view(kv_heads, n, self.groups, dim).transpose(0, 1).reshape(n, heads, dim)
            token += n
        return out

    def _rows(self, layer: int, q: Tensor, kv_heads: int, dim: int) -> Tensor:
        """The batched call. Query heads that share a key head are folded into the query length."""
        q = q[: self.short_tokens] if self.grid is None else q.index_select(0, self.grid)
        q = q.view(self.rows, self.width, kv_heads, self.groups, dim).transpose(1, 2)
        q = q.reshape(self.rows, kv_heads, self.width * self.groups, dim)
        k, v = self.cache.pages_view(layer, self.pages, self.longest)
        attend = self._merged if self.paged else F.scaled_dot_product_attention
        out = attend(q, k, v, self.mask)
        out = out.view(self.rows, kv_heads, self.width, self.groups, dim).transpose(1, 2)
        out = out.reshape(self.rows * self.width, kv_heads * self.groups * dim)
        return out if self.places is None else out.index_select(0, self.places)

    def _merged(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over all pages of a row from the attention to each page by itself."""
        q = q.index_select(0, self.owner)
        if self.shared is None:
            out, weight = _partial(q, k, v, mask)
        else:
            n, again = self.pages, (x.index_select(0, self.shared) for x in (k, v))
            masks = (None, None) if mask is None else (mask[:n], mask[n:])
            parts = (q[:n], k, v, masks[0]), (q[n:], *again, masks[1])
            out, weight = (torch.cat(both) for both in zip(*(_partial(*part) for part in parts), strict=True))
        weight = weight[self.table].masked_fill_(self.absent, -torch.inf)  # (rows, most pages, kv_heads, queries)
        weight = weight.softmax(1)[..., None]
        return (out[self.table] * weight).sum(1).to(q.dtype)


def _partial(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention (batch, heads, queries, head_dim) and the log of its denominator (batch, heads, queries), float32."""
    if q.device.type == "cpu":  # the kernel behind scaled_dot_product_attention: it reads strided keys without a copy
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)).float()
    if mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(-1).to(v.dtype), v).float(), scores.logsumexp(-1)


def _hidden(sight: Tensor, key: Tensor) -> Tensor:
    """Whether a query does not see a key. sight: int64 (4, ..., 1), see `blocks.visible`; key: (keys,) places."""
    low, first, end, hole = sight
    return ~((key < low) | ((key >= first) & (key < end))) | (key == hole)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor; to a GPU through pinned memory, without waiting for the copy."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
