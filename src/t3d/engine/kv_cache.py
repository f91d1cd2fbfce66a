"""Keys and values of everything in flight, in pages.

One arena per layer, `(num_pages * page_size + 1, 2, kv_heads, head_dim)`: token-major, so that writing is one row copy,
and a page is a batch row of a strided view, so that reading copies nothing. Pages in use are kept dense at the front;
the last row takes what padding writes and is never read.
"""

import heapq

import numpy as np
import psutil
import torch
from torch import Tensor

from t3d.engine.request import Sequence

_NUMPY_OF_SIZE = {2: np.int16, 4: np.int32, 8: np.int64}


class KVCache:
    """A fixed number of pages; sequences own lists of them, in order of position."""

    def __init__(self, num_pages, page_size, layers, kv_heads, head_dim, dtype: torch.dtype, device: torch.device):
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
        self._free = list(range(num_pages))  # a heap: the lowest page first
        self._owner: dict[int, Sequence] = {}
        self.peak = 0

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def used_pages(self) -> int:
        return self.num_pages - len(self._free)

    def missing(self, sequence: Sequence, end: int) -> int:
        """Pages the sequence still needs to hold positions up to `end`."""
        return max(0, -(-end // self.page_size) - len(sequence.pages))

    def grow(self, sequence: Sequence, end: int) -> bool:
        """Give the sequence pages for positions up to `end`; False, and nothing taken, if there are too few."""
        missing = self.missing(sequence, end)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = heapq.heappop(self._free)
            self._owner[page] = sequence
            sequence.pages.append(page)
        self.peak = max(self.peak, self.used_pages)
        return True

    def release(self, sequence: Sequence) -> None:
        """Take its pages back. One that has not ended may hold NaN, which no mask hides from the next owner."""
        for page in sequence.pages:
            del self._owner[page]
            heapq.heappush(self._free, page)
            if not sequence.ended:
                self._clear(page)
        sequence.pages = []
        sequence.cached = 0

    def compact(self) -> None:
        """Move the last pages in use into holes, so that the pages in use are `0 .. used_pages`.

        A sequence's end moves at most its own number of pages, once; all its forwards read the arena without gaps.
        """
        size = self.page_size
        while self._free and self._free[0] < self.used_pages:
            hole, last = heapq.heappop(self._free), max(self._owner)
            self.data[:, hole * size : (hole + 1) * size] = self.data[:, last * size : (last + 1) * size]
            self._clear(last)
            owner = self._owner.pop(last)
            owner.pages[owner.pages.index(last)] = hole
            self._owner[hole] = owner
            heapq.heappush(self._free, last)

    def _clear(self, page: int) -> None:
        self.data[:, page * self.page_size : (page + 1) * self.page_size] = 0

    def slots(self, sequence: Sequence, start: int, end: int) -> np.ndarray:
        """Rows of the arena that hold positions `start .. end`, int64."""
        size = self.page_size
        if end <= (start // size + 1) * size:
            first = sequence.pages[start // size] * size + start % size
            return np.arange(first, first + end - start)
        position = np.arange(start, end)
        return np.asarray(sequence.pages)[position // size] * size + position % size

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
    return 2 * layers * heads * dim * model.dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
