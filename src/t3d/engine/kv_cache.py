"""Keys and values of everything in flight, in pages, and of what may be asked again.

One arena per layer, `(num_pages * page_size + 1, 2, kv_heads, head_dim)`: token-major, so that writing is one row copy,
and a page is a batch row of a strided view, so that reading copies nothing. Pages in use are kept dense at the front;
the last row takes what padding writes and is never read.

With the prefix cache, sequences that begin with the same tokens hold the same pages. A page is known by the page before
it and by its own tokens, so a chain of pages says the whole text (as the radix trees and hash chains of SGLang, arXiv
2312.07104, and vLLM do), and its first link says all else that the keys depend on. Only pages of final tokens are ever
known: what is being denoised lies behind them. A page that nobody holds stays until its room is needed, the least
recently used goes first.
"""

import heapq
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from torch import Tensor

from t3d.blocks import block_end
from t3d.engine.guidance import Companion
from t3d.engine.query import Query
from t3d.engine.request import Sequence

_NUMPY_OF_SIZE = {2: np.int16, 4: np.int32, 8: np.int64}
Side = Sequence | Companion


@dataclass(eq=False)
class Page:
    """A page that is held, or kept for whoever asks again."""

    number: int  # its place in the arena, which may change
    holders: list[Side] = field(default_factory=list)
    key: tuple | None = None  # by which it is known: the page before it, and its tokens
    filled: int = 0  # places, from its first, whose keys are final
    spoiled: bool = False  # a sequence that held it has failed


class KVCache:
    """A fixed number of pages; sequences hold lists of them, in order of position. keep: share them, and keep them."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        keep: bool = False,
    ):
        self.page_size = page_size
        self.num_pages = num_pages
        self.scratch = num_pages * page_size  # the row for padding
        shape = (layers, self.scratch + 1, 2, kv_heads, head_dim)
        if device.type == "cpu":
            # numpy's zeros are untouched memory until written: what is resident grows with the tokens in flight.
            # Zeros, not garbage: attention multiplies masked positions by zero, and zero times NaN is NaN.
            zeros = np.zeros(shape, dtype=_NUMPY_OF_SIZE[dtype.itemsize])
            self.data = torch.from_numpy(zeros).view(dtype)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.keep = keep
        self._free = list(range(num_pages))  # a heap: the lowest page first
        self._pages: dict[int, Page] = {}  # by number, those that are not free
        self._known: dict[tuple, Page] = {}
        self._kept: dict[Page, None] = {}  # those that nobody holds, the least recently used first
        self._ragged = False  # pages were taken or given back since they were last dense
        self.peak = 0

    @property
    def free_pages(self) -> int:
        """Pages that can be had, some of which may be kept until then."""
        return len(self._free) + len(self._kept)

    @property
    def used_pages(self) -> int:
        return self.num_pages - self.free_pages

    def missing(self, side: Side, end: int) -> int:
        """Pages it still needs to hold positions up to `end`."""
        return max(0, -(-end // self.page_size) - len(side.pages))

    def grow(self, side: Side, end: int) -> bool:
        """Give it pages for positions up to `end`; False, and nothing taken, if there are too few."""
        missing = self.missing(side, end)
        if missing > self.free_pages:
            return False
        for _ in range(missing):
            if not self._free:
                self._drop(next(iter(self._kept)))
            page = Page(heapq.heappop(self._free))
            self._pages[page.number] = page
            self._hold(page, side)
        return True

    def attach(self, side: Side) -> None:
        """Give it, which has no pages, those that are known to begin its final tokens, written or about to be."""
        before = side.root
        for index in range(self._whole(side, side.base)):
            page = self._known.get((before, self._tokens(side, index)))
            if page is None:
                return
            self._kept.pop(page, None)
            self._hold(page, side)
            before = page

    def publish(self, side: Side) -> None:
        """Let others attach to its pages of final tokens, which are written by whoever comes first."""
        self._publish(side, side.base, leaving=False)

    def _publish(self, side: Side, end: int, leaving: bool) -> None:
        before = side.root
        for index in range(self._whole(side, end)):
            mine, key = self._pages[side.pages[index]], (before, self._tokens(side, index))
            page = self._known.get(key)
            if page is None and mine.key is None and not mine.spoiled:
                mine.key, page = key, mine
                self._known[key] = mine
            # who holds a page holds all before it, see `flex.in_order`; one that leaves holds none
            if page is None or (page is not mine and not leaving):
                return
            before = page

    def _whole(self, side: Side, end: int) -> int:
        """Its pages whose keys depend on nothing behind `end`; none without the prefix cache, or in full attention."""
        if not self.keep or side.request.full:
            return 0
        count = end // self.page_size
        return count - 1 if count and self._reads(side, count) > end else count

    def _reads(self, side: Side, count: int) -> int:
        """Where the block ends in which its first `count` pages end: a token's keys depend on its whole block."""
        return block_end(count * self.page_size - 1 + side.origin, side.request.final_block) - side.origin

    def _tokens(self, side: Side, index: int) -> bytes:
        """What the keys of its page depend on beside the pages before it."""
        return side.read(index * self.page_size, self._reads(side, index + 1)).tobytes()

    def extents(self, query: Query) -> dict[int, int]:
        """Of the pages that the query writes final tokens to: how many of their places are final then."""
        if not self.keep or query.final == query.start:
            return {}
        size, pages = self.page_size, query.sequence.pages
        touched = range(query.start // size, -(-query.final // size))
        return {pages[index]: min(size, query.final - index * size) for index in touched}

    def wrote(self, queries: list[Query]) -> None:
        """The forward of these queries has run."""
        for query in queries:
            for number, places in self.extents(query).items():
                self._pages[number].filled = max(self._pages[number].filled, places)

    def reach(self, side: Side, coming: dict[int, int]) -> int:
        """Its first places whose keys are final, or will be by `coming`, the extents of queries planned before."""
        size, place = self.page_size, side.cached
        while self.keep and place // size < len(side.pages):
            number = side.pages[place // size]
            end = place // size * size + max(self._pages[number].filled, coming.get(number, 0))
            if end <= place:
                break
            place = end
        return place

    def release(self, side: Side) -> None:
        """Take its pages back. One that has not ended may hold NaN, which no mask hides from the next owner."""
        if not side.failed:
            self._publish(side, side.cached, leaving=True)
        for number in reversed(side.pages):  # so that a page is dropped before those that lead to it
            page = self._pages[number]
            page.holders.remove(side)
            if side.failed:
                self._forget(page)
                page.spoiled = True
            if page.holders:
                continue
            if page.key is not None and page.filled == self.page_size:
                self._kept[page] = None
            else:
                self._return(page, clear=page.spoiled or not side.ended)
        self._ragged = True
        side.pages = []
        side.cached = 0

    def _hold(self, page: Page, side: Side) -> None:
        page.holders.append(side)
        side.pages.append(page.number)
        self.peak = max(self.peak, self.used_pages)
        self._ragged = True

    def _drop(self, page: Page) -> None:
        del self._kept[page]
        self._return(page, clear=True)

    def _return(self, page: Page, clear: bool) -> None:
        self._forget(page)
        del self._pages[page.number]
        heapq.heappush(self._free, page.number)
        if clear:
            self._clear(page.number)

    def _forget(self, page: Page) -> None:
        if page.key is not None:
            del self._known[page.key]
            page.key = None

    def compact(self) -> None:
        """Move pages that are held into holes before them, so that these are `0 .. used_pages`.

        A sequence's end moves at most its own number of pages, once; all its forwards read the arena without gaps.
        """
        if not self._ragged:
            return
        self._ragged, used = False, self.used_pages
        held = {number for number, page in self._pages.items() if page.holders}
        holes = (number for number in range(used) if number not in held)
        outside = sorted((number for number in held if number >= used), reverse=True)
        for hole, last in zip(holes, outside, strict=True):
            self._swap(hole, last)

    def _swap(self, hole: int, last: int) -> None:
        """Bring the page `last`, which is held, into `hole`, which is free or kept."""
        size = self.page_size
        here, there = (self.data[:, n * size : (n + 1) * size] for n in (hole, last))
        page, other = self._pages.pop(last), self._pages.get(hole)
        if other is None:
            heapq.heappop(self._free)  # the hole: no lower page is free
            here.copy_(there)
            there.zero_()
            heapq.heappush(self._free, last)
        else:
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)
            self._pages[last], other.number = other, last
        self._pages[hole], page.number = page, hole
        for side in page.holders:
            side.pages[side.pages.index(last)] = hole

    def _clear(self, page: int) -> None:
        self.data[:, page * self.page_size : (page + 1) * self.page_size] = 0

    def slots(self, pages: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Rows of the arena that hold places of a text that lies in `pages`, one page after the other; all int64."""
        page, inside = np.divmod(place, self.page_size)
        return pages[page] * self.page_size + inside

    def pages_view(self, layer: int, pages: int, length: int) -> tuple[Tensor, Tensor]:
        """First `length` positions of the first `pages` pages: (pages, kv_heads, length, head_dim) each, no copy."""
        _, _, heads, dim = self.data[layer].shape
        view = self.data[layer][: pages * self.page_size].view(pages, self.page_size, 2, heads, dim)[:, :length]
        return view[:, :, 0].transpose(1, 2), view[:, :, 1].transpose(1, 2)


def cache_shape(config) -> tuple[int, int, int]:
    """(layers, key-value heads, head dimension) of a transformers config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, head_dim


def bytes_per_token(model) -> int:
    """Of keys and values, in all layers."""
    layers, heads, dim = cache_shape(model.config)
    return 2 * layers * heads * dim * dtype_of(model).itemsize


def dtype_of(model) -> torch.dtype:
    """That it computes in; where weights are quantised, those of linear layers and embedding are of others."""
    return model.model.norm.weight.dtype


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for whoever asks
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available
