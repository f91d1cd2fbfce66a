"""How probable tokens were to the model when they were committed, beside its likeliest ones."""

from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor

MOST = 20  # alternatives per token


@dataclass(eq=False)
class Logprobs:
    """Natural logarithms of the model's own probabilities at consecutive places: temperature 1, nothing cut off, with
    guidance where there is any, and of the step that last committed each token.

    token: float32 (n,), of the token there. ids: int64 (n, top), the likeliest tokens, the first one first; values:
    float32 (n, top), theirs.
    """

    token: np.ndarray
    ids: np.ndarray
    values: np.ndarray

    @classmethod
    def empty(cls, n: int, top: int) -> "Logprobs":
        return cls(np.full(n, -inf, np.float32), np.zeros((n, top), np.int64), np.full((n, top), -inf, np.float32))

    def __len__(self) -> int:
        return len(self.token)

    def __getitem__(self, places) -> "Logprobs":
        return Logprobs(self.token[places], self.ids[places], self.values[places])

    def __setitem__(self, places, other: "Logprobs") -> None:
        """`other` may have more alternatives."""
        top = self.ids.shape[1]
        self.token[places] = other.token
        self.ids[places], self.values[places] = other.ids[:, :top], other.values[:, :top]


def logprobs(logits: Tensor, tokens: np.ndarray, top: int) -> Logprobs:
    """logits: float32 (n, vocab); tokens: int64 (n,); top: at most vocab."""
    total = logits.logsumexp(-1, keepdim=True)
    best = logits.topk(top, dim=-1)
    token = logits.gather(1, torch.from_numpy(tokens).to(logits.device)[:, None])
    values = (torch.cat([token, best.values], dim=1) - total).cpu().numpy()
    return Logprobs(values[:, 0], best.indices.cpu().numpy(), values[:, 1:])
