"""One forward of a batch of queries through a model's own weights, layer by layer as its family says they are made.

The lean forward saves what the modules spend on generality: no padding, no mask per layer, no cache that is copied to
grow, and the head only where logits are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t3d.engine.attention import SDPAttention, to_device
from t3d.engine.flex import FlexAttention, in_order
from t3d.engine.graphs import StepGraphs, is_steady
from t3d.engine.kv_cache import KVCache, cache_shape, dtype_of
from t3d.engine.packing import Packing
from t3d.engine.query import Query
from t3d.models.family import FamilyModel, LayerParts

ATTENTION: dict[str, type[SDPAttention | FlexAttention]] = {"sdpa": SDPAttention, "flex": FlexAttention}
_JOIN_BYTES = 1 << 30  # up to this size a model's projections are copied side by side
# From this size a weight does not stay in a core's cache. As the left factor it is read once, as it lies; as the right
# one MKL copies it first, which takes longer than a product with few tokens (benchmarks/faster.py).
_STREAMED = 1 << 20


@dataclass
class _Layer:
    """What one decoder layer needs, as functions of `(tokens, width)` tensors."""

    parts: LayerParts
    qkv: Callable[[Tensor], Tensor]  # -> (tokens, (heads + 2 * kv_heads) * head_dim)
    qk_norm: Tensor | None  # (heads + kv_heads, head_dim)
    out: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


class Runner:
    """Reads the model's weights at `refresh()`, so that a student trained in place is decoded as it is now."""

    def __init__(self, model: nn.Module, attention: str = "sdpa", graphs: bool = False):
        self.model, self.graphs = model, graphs
        self.attention = ATTENTION[attention]
        self.heads = model.config.num_attention_heads
        _, self.kv_heads, self.head_dim = cache_shape(model.config)
        self.groups = self.heads // self.kv_heads
        self.eps = model.config.rms_norm_eps
        self.shift = getattr(model.config, "logits_shift", 0)
        self.family = type(model) if isinstance(model, FamilyModel) else FamilyModel
        self._seen: list[tuple[int, int]] = []
        self._version = 0
        self.refresh()

    def version(self) -> int:
        """Another number than before whenever the weights may have changed since; writing to `.data` goes unnoticed."""
        now = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()]
        if now != self._seen:
            self._seen, self._version = now, self._version + 1
        return self._version

    @torch.no_grad()
    def refresh(self) -> None:
        body = self.model.model
        self.dtype, self.device = dtype_of(self.model), body.norm.weight.device
        small = sum(p.numel() * p.itemsize for p in body.layers.parameters()) <= _JOIN_BYTES
        self.joined = small and self.device.type == "cpu"
        self.layers = []
        for parts in map(self.family.parts, body.layers):
            qk_norm = None
            if parts.q_norm is not None:
                qk_norm = torch.cat([parts.q_norm.expand(self.heads, -1), parts.k_norm.expand(self.kv_heads, -1)])
            qkv = self._join(parts.q, parts.k, parts.v)
            self.layers.append(_Layer(parts, qkv, qk_norm, _linear(parts.out), self._mlp(parts.mlp)))
        self.head = _linear(self.model.lm_head)
        self.final_norm = self.family.norm_weight(body.norm)
        self._rope, self._steps = None, None

    def _join(self, *modules: nn.Module) -> Callable[[Tensor], Tensor]:
        """Linear layers of one input as a single product; what is not plainly linear (an adapter) is called as it is.

        Only on a CPU, and only a small model: elsewhere the weights are not copied.
        """
        if not self.joined or not all(type(m) is nn.Linear for m in modules):
            parts = [_linear(m) for m in modules]
            return lambda x: torch.cat([part(x) for part in parts], dim=-1)
        weight = torch.cat([m.weight for m in modules])
        bias = None if modules[0].bias is None else torch.cat([m.bias for m in modules])
        return product(weight, bias)

    def _mlp(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):  # mixture of experts
            return lambda x: module(x[None])[0]
        gate_up, down = self._join(module.gate_proj, module.up_proj), _linear(module.down_proj)
        activation = module.act_fn

        def forward(x: Tensor) -> Tensor:
            gate, up = gate_up(x).chunk(2, dim=-1)
            return down(activation(gate).mul_(up))

        return forward

    def _rotary(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """cos and sin, (tokens, 1, rotated), from each table; the first half of sin is negated, see `_rotate`."""
        if self._rope is None:
            every = torch.arange(self.model.config.max_position_embeddings, device=self.device)[None]
            like, self._rope = torch.empty(0, dtype=self.dtype, device=self.device), {}
            for name in {layer.parts.rotary for layer in self.layers}:
                cos, sin = self.model.model.rotary_emb(like, every, *([] if name is None else [name]))
                sin = sin[0].clone()
                sin[:, : sin.shape[1] // 2] *= -1
                self._rope[name] = cos[0][:, None], sin[:, None]
        return {name: tuple(x.index_select(0, positions) for x in table) for name, table in self._rope.items()}

    def forward(self, cache: KVCache, queries: list[Query]) -> Tensor:
        """Write the queries' keys and values to the cache; logits, float32 (n, vocab), of the tokens they want.

        The logits come in the order of `queries`; the `rows` of their segments say where.
        """
        steady = self.graphs and is_steady(queries)
        attention = None if steady else self.attention(cache, queries, self.groups, self.dtype)
        packing = Packing(cache, in_order(queries)) if steady else attention.packing
        ids, select = packing.fill(queries, self.shift)
        packed = np.stack([ids, packing.positions(), packing.slots()])
        if steady:
            if self._steps is None or self._steps.cache is not cache:
                self._steps = StepGraphs(self, cache)
            return self._steps(packing, packed, select)
        return self.compute(cache, attention, *to_device(packed, self.device), to_device(select, self.device))

    def compute(
        self, cache: KVCache, attention, ids: Tensor, positions: Tensor, slots: Tensor, select: Tensor
    ) -> Tensor:
        """Logits, float32 (len(select), vocab), of packed tokens; all arguments int64 on the device."""
        hidden = self._layers(cache, attention, ids, positions, slots, select)
        return self.head(F.rms_norm(hidden, hidden.shape[-1:], self.final_norm, self.eps)).float()

    def _layers(self, cache, attention, ids, positions, slots, select) -> Tensor:
        """Hidden states of the selected tokens; of the others the last layer computes keys and values only."""
        heads, both, dim = self.heads, self.heads + self.kv_heads, self.head_dim
        h = self.model.model.embed_tokens(ids)  # (tokens, width)
        width = h.shape[-1:]
        rotary = self._rotary(positions)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            parts = layer.parts
            x = F.rms_norm(h, width, parts.attention_norm, self.eps)
            qkv = layer.qkv(x).view(len(ids), both + self.kv_heads, dim)
            qk = qkv[:, :both]
            if layer.qk_norm is not None:
                qk = F.rms_norm(qk, (dim,), None, self.eps).mul_(layer.qk_norm)
            qk = _rotate(qk, *rotary[parts.rotary])
            new = torch.cat([qk[:, heads:], qkv[:, both:]], dim=1).view(len(ids), 2, self.kv_heads, dim)
            cache.data[number].index_copy_(0, slots, new)
            x = attention(number, qk[:, :heads]).reshape(len(ids), heads * dim)
            if number == last:
                h, x = h.index_select(0, select), x.index_select(0, select)
            x = layer.out(x)
            h += x if parts.attention_out_norm is None else F.rms_norm(x, width, parts.attention_out_norm, self.eps)
            x = layer.mlp(F.rms_norm(h, width, parts.mlp_norm, self.eps))
            h += x if parts.mlp_out_norm is None else F.rms_norm(x, width, parts.mlp_out_norm, self.eps)
        return h


def _linear(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return product(module.weight, module.bias) if type(module) is nn.Linear else module


def product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The linear layer of a weight (outputs, inputs), as the function of (tokens, inputs) that is fastest here."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < _STREAMED:
        return lambda x: F.linear(x, weight, bias)

    def left(x: Tensor) -> Tensor:
        out = torch.mm(weight, x.t()).t()
        return out.contiguous() if bias is None else out + bias

    return left


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first channels of x, as many as cos has, rotated; the sign that rotation needs is in the sine table."""
    rotated = cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat([_rotate(x[..., :rotated], cos, sin), x[..., rotated:]], dim=-1)
    half = rotated // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return (x * cos).addcmul_(swapped, sin)
