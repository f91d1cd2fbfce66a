"""Self-speculation: a model's own draft of several tokens, verified by the same weights from left to right.

The draft comes from an ordinary forward over a masked block. The verifying forward carries the draft, whose tokens see
only those before them, and behind it masks that see the draft before their own place (`Rule.TOKEN`, `Rule.NEXT`): what
the model predicts when it decodes one token at a time. Accepting and replacing by the rule of speculative sampling
(Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) makes the tokens draws of that decoder, whatever the
draft.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from t3d.blocks import Rule
from t3d.decoding.flight import Block, Segment
from t3d.decoding.sampling import _draw, distribution, sample, uniform

if TYPE_CHECKING:
    from t3d.engine.request import Sequence

PROPOSE, ACCEPT, REPLACE = 0, 2, 3  # streams of random numbers; PROPOSE is the decoder's own


@dataclass
class Draft:
    """Proposals for consecutive masks of a block. places: int64 (n,), in the block; tokens: int64 (n,), on the host.
    p: float32 (n, vocab), what they were drawn from; None: nothing, so that none is accepted."""

    places: np.ndarray
    tokens: np.ndarray
    p: Tensor | None = None


def first_run(masked: np.ndarray) -> np.ndarray:
    """Places of the first masks that lie side by side. masked: bool (block_size,) with a mask at least. int64 (n,)"""
    first = int(masked.argmax())
    rest = masked[first:]
    return np.arange(first, first + (len(rest) if rest.all() else int(rest.argmin())))


def propose(sequence: "Sequence", block: Block, places: np.ndarray, logits: Tensor) -> Draft:
    """Draws the tokens that a policy would get proposed there. logits: float32 (n, vocab).

    Raises:
        T3DError: if they are not numbers.
    """
    config, n = sequence.request.config, len(places)
    u = _numbers(sequence, block, places, PROPOSE)
    drawn, confidence, *_ = sample(
        logits,
        torch.full((n,), float(config.temperature)),
        torch.full((n,), config.top_k),
        torch.full((n,), float(config.top_p)),
        u,
        torch.zeros(n, dtype=torch.bool),
    )
    both = torch.stack([drawn.double(), confidence.double()]).cpu().numpy()
    _check(sequence, block, places, both[1])
    p = distribution(logits, config.temperature, config.top_k, config.top_p)
    return Draft(places, both[0].astype(np.int64), p)


def verification(block: Block, draft: Draft) -> list[Segment]:
    """What the verifying forward carries: the block filled up to the draft's end, and masks that see what is before."""
    end = int(draft.places[-1]) + 1
    ids = block.tokens[:end].copy()
    ids[draft.places] = draft.tokens
    filled = Segment(block.start, ids, np.zeros(end, dtype=bool), Rule.TOKEN)
    want = np.zeros(end, dtype=bool)
    want[draft.places] = True
    return [filled, Segment(block.start, np.full_like(ids, block.mask_id), want, Rule.NEXT, of=filled)]


def accept(draft: Tensor, p: Tensor, q: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative sampling at each place: whether the draft is accepted, bool (n,), and what replaces it, int64 (n,).

    draft: int64 (n,), drawn from p; p, q: float32 (n, vocab), the drafting and the verifying distribution; u, v:
    float32 (n,) in [0, 1). A draft is accepted with probability min(1, q/p) and else replaced by a draw from (q - p)+,
    so that the token is a draw from q.
    """
    at = draft[:, None]
    accepted = u * p.gather(1, at)[:, 0] < q.gather(1, at)[:, 0]
    rest = (q - p).clamp(min=0.0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, q)  # no mass only by rounding, and where none is rejected
    return accepted, _draw(rest, v)[0][:, 0]


def settle(sequence: "Sequence", block: Block, draft: Draft, logits: Tensor) -> None:
    """Commits the accepted tokens, and the one that replaces the first rejected. logits: float32 (n, vocab), verifying.

    Raises:
        T3DError: if they are not numbers.
    """
    config, device = sequence.request.config, logits.device
    q = distribution(logits, config.temperature, config.top_k, config.top_p)
    tokens = torch.from_numpy(draft.tokens).to(device)
    u, v = (_numbers(sequence, block, draft.places, stream).to(device) for stream in (ACCEPT, REPLACE))
    accepted, other = accept(tokens, torch.zeros_like(q) if draft.p is None else draft.p, q, u, v)
    chosen = torch.where(accepted, tokens, other)
    shown = q if config.confidence == "sampling" and config.temperature > 0 else logits.softmax(-1)
    confidence = shown.gather(1, chosen[:, None])[:, 0]
    accepted, chosen, confidence = torch.stack([accepted.double(), chosen.double(), confidence.double()]).cpu().numpy()
    _check(sequence, block, draft.places, confidence)
    count = len(accepted) if accepted.all() else int(accepted.argmin()) + 1
    chosen, confidence = chosen[:count].astype(np.int64), confidence[:count].astype(np.float32)
    sequence.commit_at(block, draft.places[:count], chosen, confidence, logits[:count])


def _numbers(sequence: "Sequence", block: Block, places: np.ndarray, stream: int) -> Tensor:
    n = len(places)
    if sequence.request.config.temperature == 0:
        return torch.zeros(n)
    seed, step = torch.full((n,), sequence.request.seed), torch.full((n,), block.step)
    return uniform(seed, torch.from_numpy(block.start + places), step, stream)


def _check(sequence: "Sequence", block: Block, places: np.ndarray, values: np.ndarray) -> None:
    """Raises T3DError at the first place whose value is no number."""
    if np.isnan(values).any():
        raise sequence.request.not_numbers(block.start + int(places[np.isnan(values).argmax()]), block.step)
