"""Log-probabilities at selected positions without ever holding all logits: LM head and log-softmax in chunks."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # positions at a time: 0.6 GB of fp32 logits for 151,936 tokens
WHOLE_CHUNK = 256  # where whole distributions are compared, some eight tensors of that width at once


def in_chunks(function: Callable, *columns: Tensor, chunk: int = CHUNK):
    """`function` of the columns' rows, `chunk` at a time; what it returns (a tensor or a tuple of them), concatenated.

    The backward pass computes each chunk again, so memory does not grow with rows * vocabulary.
    """
    rows = zip(*(column.split(chunk) for column in columns), strict=True)
    parts = [checkpoint(function, *row, use_reentrant=False) for row in rows]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return torch.cat(parts)


def token_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor, mask_id: int, chunk: int = CHUNK) -> Tensor:
    """log p(token) at each position, float32 `(m, k)`; `tokens (m, k)`, `hidden (m, width)`, `weight (vocab, width)`.

    The mask token is not part of the distribution, as in the decoder.
    """
    return in_chunks(lambda h, t: _token_logprobs(h, weight, t, mask_id), hidden, tokens, chunk=chunk)


@torch.no_grad()
def choose_tokens(hidden: Tensor, weight: Tensor, mask_id: int, temperature: float = 0.0, chunk: int = CHUNK) -> Tensor:
    """The model's own choice at each position, int64 `(m,)`: argmax, or one sample at `temperature`."""
    return in_chunks(lambda h: _choose(mask_free_logits(h, weight, mask_id), temperature), hidden, chunk=chunk)


@torch.no_grad()
def compare_tokens(hidden: Tensor, weight: Tensor, target: Tensor, mask_id: int, temperature: float = 0.0):
    """The target `(m,)` and the model's own choice at each position, int64 `(m, 2)`, and log p of both, `(m, 2)`."""

    def compare(h: Tensor, x: Tensor):
        logits = mask_free_logits(h, weight, mask_id)
        tokens = torch.stack([x, _choose(logits, temperature)], 1)
        return tokens, logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)

    return in_chunks(compare, hidden, target)


def _choose(logits: Tensor, temperature: float) -> Tensor:
    if temperature > 0:
        return torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(-1)
    return logits.argmax(-1)


def _token_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    logits = mask_free_logits(hidden, weight, mask_id)
    return logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)


def mask_free_logits(hidden: Tensor, weight: Tensor, mask_id: int) -> Tensor:
    """float32 logits `(m, vocab)` with minus infinity at the mask token."""
    logits = torch.nn.functional.linear(hidden, weight).float()  # (m, vocab)
    forbidden = torch.zeros(logits.shape[-1], device=logits.device).index_fill_(
        0, torch.tensor(mask_id, device=logits.device), float("-inf")
    )
    return logits + forbidden
