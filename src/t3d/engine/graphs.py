"""Steady decoding as CUDA graphs: a forward in which nothing is prefilled is padded to one of few shapes and replayed.

A forward of a few hundred tokens is over before Python has launched its kernels one by one; a graph launches them all
at once. On a device without CUDA graphs the padded forward simply runs, which serves the tests.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from t3d.engine.flex import PagedFlex, page_plan
from t3d.engine.kv_cache import KVCache
from t3d.engine.packing import Packing
from t3d.engine.query import Query


def is_steady(queries: list[Query]) -> bool:
    """Whether nothing is being prefilled, and there are logits to wait for."""
    return all(q.steady for q in queries) and any(q.denoise for q in queries)


def padded(count: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few sizes, and at most half of one is padding."""
    size = 16
    while size < count:
        size *= 2
    return size * 3 // 4 if size > 16 and count <= size * 3 // 4 else size


class StepGraphs:
    """The steady forwards over one cache; `runner` computes them."""

    def __init__(self, runner, cache: KVCache):
        self.runner, self.cache = runner, cache
        self.steps: dict[tuple[int, int], _Step] = {}
        # one pool of memory for all graphs: of two, only the last that was replayed has logits that are still wanted
        self.pool = torch.cuda.graph_pool_handle() if cache.data.is_cuda else None

    def __call__(self, packing: Packing, packed: np.ndarray, select: np.ndarray) -> Tensor:
        """Logits float32 (len(select), vocab); packed: int64 (3, tokens) ids, positions and slots of the queries."""
        tokens, wanted = padded(packed.shape[1]), padded(len(select))
        inputs = page_plan(packing, tokens, self.cache.num_pages)
        for name, row, fill in zip(("ids", "positions", "slots"), packed, (0, 0, self.cache.scratch), strict=True):
            inputs[name] = np.full(tokens, fill, dtype=np.int64)
            inputs[name][: len(row)] = row
        inputs["select"] = np.zeros(wanted, dtype=np.int64)
        inputs["select"][: len(select)] = select
        if (tokens, wanted) not in self.steps:
            self.steps[tokens, wanted] = _Step(inputs, self._forward, self.cache.data.device, self.pool)
        return self.steps[tokens, wanted](inputs)[: len(select)]

    def _forward(self, x: dict[str, Tensor]) -> Tensor:
        attention = PagedFlex(self.cache, x, self.runner.groups, steady=True)
        return self.runner.compute(self.cache, attention, x["ids"], x["positions"], x["slots"], x["select"])


class _Step:
    """One shape: inputs at fixed addresses, filled by one copy, and what is computed from them."""

    def __init__(self, inputs: dict[str, np.ndarray], forward: Callable[[dict[str, Tensor]], Tensor], device, pool):
        size = sum(array.size for array in inputs.values())
        self.host = torch.empty(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.static = torch.empty(size, dtype=torch.int64, device=device)
        parts = self.static.split([array.size for array in inputs.values()])
        views = {name: part.view(a.shape) for (name, a), part in zip(inputs.items(), parts, strict=True)}
        self.graph = None
        if device.type != "cuda":
            self.compute = lambda: forward(views)
            return
        self._fill(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets the libraries choose their kernels, outside of the capture
            for _ in range(2):
                forward(views)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.logits = forward(views)

    def _fill(self, inputs: dict[str, np.ndarray]) -> None:
        np.concatenate([array.ravel() for array in inputs.values()], out=self.host.numpy())
        self.static.copy_(self.host, non_blocking=True)

    def __call__(self, inputs: dict[str, np.ndarray]) -> Tensor:
        self._fill(inputs)
        if self.graph is None:
            return self.compute()
        self.graph.replay()
        return self.logits
