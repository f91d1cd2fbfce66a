"""The block layout: who is in which block, and who sees whom, in training and in the decoder's cache.

Blocks are counted from position 0. A prompt begins there, so its tail shares the first generated block; or, where a
family anchors blocks at the response, at its `origin`, so that it ends with a block. In a model of full attention every
token sees every other, and blocks say only what is decided before what. A training row holds, for each document, its
clean tokens and any number of noisy copies of the blocks that hold response tokens; a decoder's row is the case without
noisy copies. Consecutive blocks of a noisy copy may be noisy together, as several blocks in flight are: such a group
sees what is clean before it, and itself from left to right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t3d.errors import T3DError

CLEAN = 0  # the copy number of clean tokens; noisy copies count from 1
PADDING = -1  # the document number of padding


def block_ids(positions, block_size: int | None):
    """Block of each absolute position (tensor, array or int), counted from position 0; None: all are in one."""
    return positions * 0 if block_size is None else positions // block_size


def origin(prompt: int, block_size: int, anchored: bool) -> int:
    """Position of the first of `prompt` tokens: 0, or, where blocks are anchored at the response, the least at which
    the response begins a block. Rotary attention sees distances only, so nothing else depends on it."""
    return -prompt % block_size if anchored else 0


def geometry(model_config) -> dict[str, bool]:
    """What a model's family says of blocks. anchored: they are counted from the response's first token, see `origin`.
    full: every token sees every other; then they are anchored, too."""
    full = getattr(model_config, "attention", "block") == "full"
    return {"anchored": full or getattr(model_config, "anchor", "start") == "prompt", "full": full}


def check_blocks(model_config, what: str) -> None:
    """Raises T3DError for a model of full attention, naming `what` needs that earlier blocks do not see later ones."""
    if geometry(model_config)["full"]:
        raise T3DError(
            f"{what} needs blocks that see only earlier ones, but in this model every token sees every other"
        )


def block_start(position, block_size: int):
    """First position of the block that `position` lies in; of a length, the end of its last whole block."""
    return position // block_size * block_size


def block_end(position, block_size: int):
    """One past the last position of the block that `position` lies in."""
    return (position // block_size + 1) * block_size


def whole_blocks(length: int, block_size: int) -> int:
    """Positions of the fewest blocks that hold `length` tokens."""
    return -(-length // block_size) * block_size


class Rule(Enum):
    """Whom the tokens of a decoder's segment see, besides everything final.

    BLOCK: the segment up to the end of their own block. TOKEN: the segment up to themselves. NEXT: of another segment,
    the tokens before their own place, and themselves: with masks, what a model of blocks of one token predicts.
    EXCEPT: of another segment, all but the token at their own place, and themselves.
    """

    BLOCK = "block"
    TOKEN = "token"
    NEXT = "next"
    EXCEPT = "except"


def visible(rule: Rule, final: int, place: int, start: int, length: int, block_size: int, of: int = 0) -> np.ndarray:
    """What each of a segment's tokens sees in its sequence's cache: int64 (4, length): low, first, end and hole.

    Places below `low`, and those in `first .. end`, but for `hole` (-1: none). final: places that hold the final tokens
    before the segment. place: of the segment's first token in the cache. start: its position in the text. of: where the
    segment that NEXT and EXCEPT look at lies in the cache; it has the same positions and ends before this one begins.
    """
    n = np.arange(length)
    own = place + n
    none = np.full(length, -1)
    if rule is Rule.BLOCK:
        end = np.minimum(block_end(start + n, block_size) - start, length)  # the last block may be short
        return np.stack([np.full(length, final), np.full(length, place), place + end, none])
    if rule is Rule.TOKEN:
        return np.stack([np.full(length, final), np.full(length, place), own + 1, none])
    if rule is Rule.NEXT:
        return np.stack([of + n, own, own + 1, none])
    return np.stack([np.full(length, of + length), own, own + 1, of + n])


def sees(q_document, q_copy, q_block, q_group, k_document, k_copy, k_block):
    """Whether a query token attends to a key token: the clean tokens before its group, and of its group's copy its own
    block and those before it. A group is named by its first block; a block that is noisy alone is its own group.

    Broadcasts; the same expression serves boolean masks and FlexAttention's `mask_mod`.
    """
    earlier = (k_copy == CLEAN) & (k_block < q_group)
    own = (k_copy == q_copy) & (q_group <= k_block) & (k_block <= q_block)
    return (q_document == k_document) & (earlier | own)


def block_causal_mask(length: int, block_size: int, device=None) -> Tensor:
    """The decoder's mask: boolean `(length, length)`, True where the row's token sees the column's."""
    block = block_ids(torch.arange(length, device=device), block_size)
    zero = torch.zeros((), dtype=torch.long, device=device)
    return sees(zero, zero, block[:, None], block[:, None], zero, zero, block[None, :])


@dataclass
class Layout:
    """Where each token of a batch of rows belongs. All fields are `(rows, length)` int64.

    document: which document of the batch, `PADDING` for padding (padding sees only padding, so no row is empty).
    copy: `CLEAN`, or the number of the noisy copy.
    position: absolute position in its document; a noisy token has its original's.
    group: the first of the blocks that are noisy together with its own; None: each is noisy alone.
    block_size: None: full attention, a copy sees all of itself.
    """

    document: Tensor
    copy: Tensor
    position: Tensor
    block_size: int | None
    group: Tensor | None = None

    def __post_init__(self):
        if self.group is None:
            self.group = self.block

    @property
    def block(self) -> Tensor:
        return block_ids(self.position, self.block_size)

    def predictors(self, select: Tensor, shift: int) -> Tensor:
        """Whose logits predict the tokens `select`, both flat indices into rows * length, int64 `(m,)`.

        shift 0: their own. 1: those of the token before: in the same copy, or the clean one before a group's first. The
        first token of a document, which nothing predicts, has its own.
        """
        if not shift:
            return select
        document, copy, position, group = (x.flatten() for x in (self.document, self.copy, self.position, self.group))
        before = (position[select] - 1).clamp(min=0)
        inside = (position[select] == 0) | (block_ids(before, self.block_size) >= group[select])
        copies, length = copy.max() + 1, position.max() + 1

        def number(document, copy, position):
            return ((document + 1) * copies + copy) * length + position

        places, order = number(document, copy, position).sort()
        wanted = number(document[select], torch.where(inside, copy[select], CLEAN), before)
        return order[torch.searchsorted(places, wanted)]

    def boolean_mask(self) -> Tensor:
        """`(rows, 1, length, length)`, True = sees, as scaled_dot_product_attention takes it."""
        query = (x[:, :, None] for x in (self.document, self.copy, self.block, self.group))
        key = (x[:, None, :] for x in (self.document, self.copy, self.block))
        return sees(*query, *key)[:, None]

    def flex_mask(self):
        """The same rule as a FlexAttention `BlockMask` (never materialised as a dense mask)."""
        from torch.nn.attention.flex_attention import create_block_mask

        d, c, b, g = self.document, self.copy, self.block, self.group

        def mask_mod(row, head, q, k):
            return sees(d[row, q], c[row, q], b[row, q], g[row, q], d[row, k], c[row, k], b[row, k])

        rows, length = d.shape
        return create_block_mask(mask_mod, rows, None, length, length, device=d.device)

    def attention_mask(self, implementation: str):
        """The form that a transformers model with this attention implementation takes.

        Raises:
            T3DError: if the implementation has no form for such a mask.
        """
        if implementation not in MASKS:
            raise T3DError(
                f"attention implementation {implementation!r} knows no block mask; "
                "use sdpa, flex_attention, block_sdpa or eager"
            )
        return MASKS[implementation](self)

    def additive_mask(self) -> Tensor:
        """As `boolean_mask`, to be added to the scores: 0 or minus infinity."""
        mask = self.boolean_mask()
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


# What each attention implementation takes; one that is registered with transformers adds its own
MASKS: dict[str, Callable[[Layout], Any]] = {
    "flex_attention": Layout.flex_mask,
    "sdpa": Layout.boolean_mask,
    "eager": Layout.additive_mask,
}
