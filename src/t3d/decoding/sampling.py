"""From logits to tokens. Pure functions of tensors: no generator state, so a draw depends only on what names it."""

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit constant."""
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _MUL_1, _MUL_2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap; the masks make the right shifts logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MUL_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MUL_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(seed: Tensor, position: Tensor, step: Tensor, stream: int = 0) -> Tensor:
    """One number in [0, 1) per (seed, position, step, stream): a counter-based hash. int64 in, float32 out.

    A token therefore depends on its sequence's own seed and its place, not on what else is in the batch.
    """
    x = _mix(seed + _signed(0x9E3779B97F4A7C15 * (stream + 1) & _MASK_64))
    x = _mix(x + _GOLDEN * (position + 1))
    x = _mix(x + _GOLDEN * (step + 1))
    return ((x >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24


def derive_seed(*parts: int) -> int:
    """A non-negative 63-bit seed from integers, e.g. (base seed, prompt index, sample)."""
    x = 0
    for part in parts:
        x = (x + 0x9E3779B97F4A7C15 * ((part & _MASK_64) + 1)) & _MASK_64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
        x ^= x >> 31
    return x >> 1


def _draw(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: index and probability per row of unnormalised weights (rows, n); zero is never drawn."""
    cdf = weights.cumsum(-1)
    total = cdf[:, -1:]
    index = torch.searchsorted(cdf, u[:, None] * total, right=True).clamp_(max=weights.shape[1] - 1)
    return index, weights.gather(1, index) / total


def _filtered(logits: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) cut to the top_k likeliest tokens, then to the top_p nucleus of what is left: weights of falling
    logits, not normalised, and the tokens they belong to. (rows, vocab)"""
    vocab = logits.shape[1]
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)
    limit = torch.where(top_k > 0, top_k, vocab)
    p = ranked.softmax(-1).masked_fill(rank >= limit[:, None], 0.0)
    p = p / p.sum(-1, keepdim=True)
    return p.masked_fill((p.cumsum(-1) - p) >= top_p[:, None], 0.0), order


def _draw_filtered(logits: Tensor, top_k: Tensor, top_p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """As `_draw`, from the cut softmax(logits)."""
    p, order = _filtered(logits, top_k, top_p)
    index, probability = _draw(p, u)
    return order.gather(1, index), probability


def distribution(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What `sample` draws from at one sequence's settings, float32 (rows, vocab): one-hot at temperature 0; NaN in rows
    that are no numbers."""
    if temperature == 0:
        hot = torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
        return hot.masked_fill_(logits.softmax(-1).isnan(), torch.nan)
    scaled = logits / temperature
    if not top_k and top_p == 1:
        return scaled.softmax(-1)
    n = len(logits)
    cuts = torch.full((n,), top_k, device=logits.device), torch.full((n,), top_p, device=logits.device)
    weights, order = _filtered(scaled, *cuts)
    return torch.zeros_like(logits).scatter_(1, order, weights / weights.sum(-1, keepdim=True))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    u: Tensor,
    sampling_confidence: Tensor,
    entropy: bool = False,
    margin: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Choose one token per row of float32 logits (rows, vocab); a token to leave out has logit -inf.

    temperature, top_p, u: float32 (rows,); top_k: int64 (rows,); sampling_confidence: bool (rows,). They may live on
    the host while the logits are on a device: which rows take which path is decided without waiting for the device.
    Returns tokens int64 (rows,), their probabilities float32 (rows,) under the untempered, unfiltered distribution (or,
    where `sampling_confidence`, under the one sampled from), and, if asked for, the untempered entropy in nats (rows,)
    and by how much the likeliest token's untempered probability is above the second's (rows,).
    """
    device = logits.device
    best, tokens = logits.max(-1)
    above = logits - best[:, None]  # at most 0
    weights = above.exp() if entropy else above.exp_()  # as large as the logits
    z = weights.sum(-1)  # (rows,)
    entropies = margins = None
    if margin:
        first, second = weights.topk(2, dim=-1).values.unbind(-1)
        margins = (first - second) / z
    if entropy:
        entropies = z.log() - (weights * above.masked_fill_(weights == 0, 0.0)).sum(-1) / z

    random = temperature > 0
    if not bool(random.any()):
        return tokens, z.reciprocal(), entropies, margins

    drawn_confidence = torch.zeros_like(z)
    filtered = random & ((top_k > 0) | (top_p < 1))
    for rows, cut in ((random & ~filtered, False), (filtered, True)):
        index = rows.nonzero()[:, 0]
        if len(index) == 0:
            continue
        on_host = (temperature[index], top_k[index], top_p[index], u[index])
        index, t, k, p, v = (x.to(device, non_blocking=True) for x in (index, *on_host))
        scaled = logits[index] / t[:, None]
        chosen, probability = _draw_filtered(scaled, k, p, v) if cut else _draw(scaled.softmax(-1), v)
        tokens[index] = chosen[:, 0]
        drawn_confidence[index] = probability[:, 0]
    confidence = weights.gather(1, tokens[:, None])[:, 0] / z
    own = (random & sampling_confidence).to(device, non_blocking=True)
    return tokens, torch.where(own, drawn_confidence, confidence), entropies, margins
