"""Attention of training rows on the CPU: the work that the layout asks for, and no square mask.

A dense mask makes every token of a row meet every other one. Here the tokens of a document are taken a chunk at a time,
each against the keys that its blocks can see: the clean tokens before them, which lie in a row, and the chunk itself.
Nothing meets another document or padding. Importing this registers it with transformers as
`attn_implementation="block_sdpa"`; without a plan it is transformers' own SDPA.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from t3d.blocks import CLEAN, MASKS, PADDING, Layout, sees

NAME = "block_sdpa"
CHUNK = 64  # queries at a time; a noisy chunk pays for all of its own keys and uses the diagonal


@dataclass
class BlockPlan:
    """How to compute the attention of a `Layout`; made once per batch, used by every layer of every model.

    order: the tokens that are not padding, as flat indices into rows * length: document by document, its clean tokens,
    then its noisy ones by group. None: all of them, as they are.
    pieces: int64 (pieces, 5): `start`, `end`, `prefix`, `limit` and `own` of each. Queries `start .. end` meet the keys
    `prefix .. limit`, then `own .. end`, all in that order.
    seen: of each piece which keys its queries see, boolean (queries, keys); None: all.
    """

    order: Tensor | None
    pieces: Tensor
    seen: list[Tensor | None]
    _masks: dict[torch.dtype, list[Tensor | None]] = field(default_factory=dict)

    def masks(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Of each piece the mask that is added to its scores, or None."""
        if dtype not in self._masks:
            self._masks[dtype] = [
                seen if seen is None else torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
                for seen in self.seen
            ]
        return self._masks[dtype]


def plan(layout: Layout) -> BlockPlan:
    rows, length = layout.document.shape
    document, copy, position = (x.flatten() for x in (layout.document, layout.copy, layout.position))
    block, group = layout.block.flatten(), layout.group.flatten()
    places = torch.arange(rows * length)
    first = torch.full((int(document.max()) + 2,), rows * length).scatter_reduce(0, document + 1, places, "amin")
    order = places
    for key in (position, copy, torch.where(copy == CLEAN, -1, group), first[document + 1]):  # the last counts most
        order = order[torch.argsort(key[order], stable=True)]
    order = order[document[order] != PADDING]
    document, copy, block, group = (x[order] for x in (document, copy, block, group))
    pieces = []
    _, sizes = torch.unique_consecutive(document, return_counts=True)
    start = 0
    for size in sizes.tolist():
        noisy, end = start + int((copy[start : start + size] == CLEAN).sum()), start + size
        for first, last in _chunks(copy, group, start, noisy):
            pieces.append((first, last, start, start, start))  # the keys are one run
        for first, last in _chunks(copy, group, noisy, end):
            limit = start + int((block[start:noisy] < group[last - 1]).sum())
            pieces.append((first, last, start, limit, first))
        start = end
    whole = torch.equal(order, places)
    seen = [_seen(*piece, document, copy, block, group) for piece in pieces]
    return BlockPlan(None if whole else order, torch.tensor(pieces, dtype=torch.long).reshape(-1, 5), seen)


def _chunks(copy: Tensor, group: Tensor, begin: int, stop: int):
    """Runs of at most `CHUNK` tokens, or of one group where that is longer, that end where a group ends."""
    _, sizes = torch.unique_consecutive(torch.stack([copy, group])[:, begin:stop], dim=1, return_counts=True)
    first = last = begin
    for size in sizes.tolist():
        if last > first and last + size - first > CHUNK:
            yield first, last
            first = last
        last += size
    if last > first:
        yield first, last


def _seen(start: int, end: int, prefix: int, limit: int, own: int, *places: Tensor) -> Tensor | None:
    """places: document, copy, block and group of each token."""
    keys = torch.cat([torch.arange(prefix, limit), torch.arange(own, end)])
    seen = sees(*(x[start:end, None] for x in places), *(x[keys] for x in places[:-1]))
    return None if seen.all() else seen


@torch.library.custom_op("t3d::block_attention", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, pieces: Tensor, masks: list[Tensor | None], scale: float
) -> tuple[Tensor, Tensor]:
    """Every piece's attention and the logarithms of its sums of weights, (kv_heads, groups, tokens).

    An operator of its own, because activation checkpointing looks at every call of an operator in Python: it keeps
    these two tensors, and never sees a thousand slices.
    """
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for piece, mask in zip(pieces.tolist(), masks, strict=True):
        start, end = piece[:2]
        out[:, :, start:end], lse[:, :, start:end] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, start:end], _keys(k, piece, q), _keys(v, piece, q), attn_mask=mask, scale=scale
        )
    return out, lse


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pieces: Tensor, masks: list[Tensor | None], scale: float):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


class _BlockAttention(torch.autograd.Function):
    """q (kv_heads, groups, tokens, dim); k, v (kv_heads, tokens, dim); all in the plan's order.

    PyTorch's CPU kernels on every piece. By hand and not by autograd, because the gradient of a slice is a tensor of
    zeros as large as what was sliced, for every piece.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float):
        out, lse = attend(q, k, v, plan.pieces, plan.masks(q.dtype), scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        *saved, lse = ctx.saved_tensors
        # Not in bfloat16: PyTorch's backward kernel takes twice as long there, and every partial sum would be rounded.
        q, k, v, out, grad = (x.to(lse.dtype) for x in (*saved, grad))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for piece, mask in zip(ctx.plan.pieces.tolist(), ctx.plan.masks(q.dtype), strict=True):
            start, end, prefix, limit, own = piece
            dq[:, :, start:end], *both = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, start:end],
                q[:, :, start:end],
                _keys(k, piece, q),
                _keys(v, piece, q),
                out[:, :, start:end],
                lse[:, :, start:end],
                0.0,
                False,
                attn_mask=mask,
                scale=ctx.scale,
            )
            seen = limit - prefix
            for total, part in zip((dk, dv), both, strict=True):
                part = part.sum(1)
                if seen:
                    total[:, prefix:limit] += part[:, :seen]
                total[:, own:end] += part[:, seen:]
        return *(x.to(saved[0].dtype) for x in (dq, dk, dv)), None, None


def _keys(x: Tensor, piece: list[int], q: Tensor) -> Tensor:
    """A piece's keys or values for every query head, (kv_heads, groups, keys, dim), without a copy per group."""
    _, end, prefix, limit, own = piece
    keys = x[:, own:end]
    if limit > prefix:
        keys = torch.cat([x[:, prefix:limit], keys], 1)
    return keys[:, None].expand(-1, q.shape[1], -1, -1)


def block_sdpa_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, plan=None, **kwargs):
    """transformers' attention function: query `(rows, heads, length, dim)`, key and value with fewer heads."""
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    rows, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    kind = query.device.type  # autocast knows PyTorch's own attention, but not this one
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    q, k, v = (_in_order(x, plan.order).to(dtype) for x in (query, key, value))
    out = _BlockAttention.apply(q.unflatten(0, (kv_heads, -1)), k, v, plan, scaling or dim**-0.5)
    out = out.flatten(0, 1).transpose(0, 1)  # (tokens, heads, dim)
    if plan.order is not None:
        out = out.new_zeros(rows * length, heads, dim).index_copy(0, plan.order, out)
    return out.reshape(rows, length, heads, dim), None


def _in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """(rows, heads, length, dim) to (heads, tokens, dim)."""
    x = x.transpose(0, 1).flatten(1, 2)
    return x if order is None else x.index_select(1, order)


AttentionInterface.register(NAME, block_sdpa_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
MASKS[NAME] = plan
