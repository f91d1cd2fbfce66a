"""One denoising step of every block in flight: sample each masked position, commit those the strategy chooses."""

import numpy as np
import torch
from torch import Tensor

from t3d.decoding.sampling import sample, uniform
from t3d.decoding.strategies import STRATEGIES, Candidates, commit_mask, step_quota
from t3d.engine.request import Sequence
from t3d.errors import T3DError


def commit_step(
    sequences: list[Sequence], masks: list[np.ndarray], logits: Tensor, mask_id: int
) -> list[tuple[Sequence, T3DError]]:
    """Advance each sequence's block in flight by one step, in place.

    masks: per sequence, bool (block_size,), what is masked. logits: float32 (masked positions of all, vocab), in that
    order; overwritten. Only what was drawn comes to the host: token, confidence, perhaps entropy of each position.
    Returns the sequences whose logits are not numbers, each with an error that names it; what was committed to those is
    worthless, the others are not touched by it.
    """
    configs = [s.request.config for s in sequences]
    kinds = [STRATEGIES[c.strategy] for c in configs]
    width = max(len(m) for m in masks)
    masked = np.zeros((len(masks), width), dtype=bool)
    for row, mask in enumerate(masks):
        masked[row, : len(mask)] = mask
    rows, columns = masked.nonzero()
    row_of, counts = torch.from_numpy(rows), masked.sum(1)

    def per_row(values, dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    def per_position(values, dtype) -> Tensor:
        return per_row(values, dtype)[row_of]

    seed = per_position([s.request.seed for s in sequences], torch.int64)
    step = per_position([s.step for s in sequences], torch.int64)
    position = per_position([s.base for s in sequences], torch.int64) + torch.from_numpy(columns)

    def numbers(stream: int, needed: bool) -> Tensor:
        """Each position's uniform number; hashing is dear beside a small model's forward, so only where used."""
        return uniform(seed, position, step, stream) if needed else torch.zeros(len(rows))

    logits[:, mask_id] = -torch.inf  # the mask is never an answer
    tokens, confidence, entropy = sample(
        logits,
        per_position([c.temperature for c in configs], torch.float32),
        per_position([c.top_k for c in configs], torch.int64),
        per_position([c.top_p for c in configs], torch.float32),
        numbers(stream=0, needed=any(c.temperature > 0 for c in configs)),
        per_position([c.confidence == "sampling" for c in configs], torch.bool),
        entropy=any(k.needs_entropy for k in kinds),
    )
    drawn = [tokens, confidence] if entropy is None else [tokens, confidence, entropy]
    tokens, confidence, *more = torch.stack([x.double() for x in drawn]).cpu()  # one copy: the step's only wait
    tokens, confidence = tokens.long(), confidence.float()
    failures: dict[int, T3DError] = {}
    for place in confidence.isnan().nonzero()[:, 0].tolist():
        sequence = sequences[rows[place]]
        error = T3DError(
            f"{sequence.request}: the model's logits are not numbers (NaN or inf) at position {int(position[place])}, "
            f"step {sequence.step}; look at its weights, or use a wider dtype"
        )
        failures.setdefault(int(rows[place]), error)

    flat = torch.from_numpy(rows * width + columns)

    def grid(values: Tensor, fill: float) -> Tensor:
        out = torch.full((len(masks) * width,), fill, dtype=values.dtype)
        return out.index_copy_(0, flat, values).view(len(masks), width)

    quota = [
        min(step_quota(c.block_size, c.steps, s.step), n)
        for s, c, n in zip(sequences, configs, counts.tolist(), strict=True)
    ]
    every = Candidates(
        masked=torch.from_numpy(masked),
        confidence=grid(confidence, -torch.inf),
        entropy=grid(more[0].float(), torch.inf) if more else None,
        u=grid(numbers(stream=1, needed=True), 0.0) if any(k.needs_random for k in kinds) else None,
        quota=per_row(quota, torch.int64),
        floor=per_row([q if c.floor == "schedule" else 1 for q, c in zip(quota, configs, strict=True)], torch.int64),
        threshold=per_row([c.threshold for c in configs], torch.float32),
        entropy_bound=per_row([c.entropy_bound for c in configs], torch.float32),
        factor=per_row([c.factor for c in configs], torch.float32),
        risk=per_row([c.risk for c in configs], torch.float32),
    )
    chosen = torch.zeros_like(every.masked)
    for name in {k.name for k in kinds}:
        mine = torch.tensor([row for row, k in enumerate(kinds) if k.name == name])
        some = every if len(mine) == len(kinds) else every.rows(mine)
        chosen[mine] = commit_mask(STRATEGIES[name], some)

    rows, columns = chosen.numpy().nonzero()
    tokens, confidence = grid(tokens, 0).numpy()[rows, columns], every.confidence.numpy()[rows, columns]
    ends = np.searchsorted(rows, np.arange(len(sequences) + 1)).tolist()
    for row, sequence in enumerate(sequences):
        mine = slice(ends[row], ends[row + 1])
        place = sequence.base + columns[mine]
        sequence.tokens[place] = tokens[mine]
        sequence.step_map[place] = sequence.step
        sequence.confidence[place] = confidence[mine]
        sequence.step += 1
    return [(sequences[row], error) for row, error in failures.items()]
