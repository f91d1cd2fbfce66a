"""`mean_field`: reverse KL from one student step to the teacher's joint over the block, by coordinates (ours).

One denoising step is a factorised distribution `q = prod q_i` over the masked positions M. What few-step decoding
wants is the q closest to the teacher's joint p in KL(q || p), and for a factorised q that gradient is exact without
REINFORCE, the coordinate identity of mean-field variational inference (Bishop 2006, section 10.1):

    grad KL(q || p) = sum_{i in M} E_{x_{M\\i} ~ q} [ grad KL(q_i || p(. | state, x_{M\\i})) ]

`p(. | state, x_{M\\i})` is the teacher predicting one masked position among filled ones, a state it knows well.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t3d.blocks import PADDING
from t3d.distill.config import T3DConfig
from t3d.distill.data import TrainingBatch
from t3d.distill.logprobs import CHUNK, choose_tokens, mask_free_logits
from t3d.distill.objectives.base import Forward, Objective


class MeanField(Objective):
    """`L = mean_i sum_v q_i(v) (log q_i(v) - max(log p(v | ...), floor)) + anchor * CE to verified trajectories`.

    The masked positions are filled with the student's own choice (argmax, or a sample at `mf_temperature`); copy `c` of
    a noisy block masks its c-th one again; one teacher forward over all copies gives every conditional.
    """

    needs_reference = True
    beyond_length = True  # the teacher's conditionals need no labels, so what follows the stop is learned too
    on_policy = True

    def loss(self, batch: TrainingBatch, student: Forward, reference: Forward, config: T3DConfig, mask_id: int):
        hidden, weight = student(lambda h, w: (h, w))
        fill = choose_tokens(hidden.detach(), weight.detach(), mask_id, config.mf_temperature)
        turn = place_in_block(batch.block, shuffle=config.mf_copies > 0)
        copies = config.mf_copies or int(turn.max()) + 1
        asked = turn < copies
        teacher_hidden, teacher_weight = reference(
            lambda h, w: (h, w), masked_one_by_one(batch, fill, turn, copies, mask_id)
        )
        chunks = zip(
            hidden[asked].split(CHUNK), teacher_hidden.split(CHUNK), batch.target[asked].split(CHUNK), strict=True
        )
        parts = [
            checkpoint(_terms, h, weight, t, teacher_weight, x, mask_id, config.mf_floor, use_reentrant=False)
            for h, t, x in chunks
        ]
        kl, logp = (torch.cat(column) for column in zip(*parts, strict=True))
        labelled = batch.labelled[asked]
        anchor = -(logp * labelled).sum() / labelled.sum().clamp(min=1)
        metrics = {"loss/kl": kl.detach().mean(), "loss/anchor": anchor.detach()}
        return kl.mean() + config.mf_anchor * anchor, metrics


def place_in_block(block: Tensor, shuffle: bool = False) -> Tensor:
    """Number 0, 1, ... the masked positions of each block, in order of position or at random, `(m,)`.

    `block (m,)` numbers the block of each; equal numbers stand together.
    """
    key = torch.rand(len(block), device=block.device) if shuffle else torch.zeros(len(block), device=block.device)
    order = torch.argsort(key, stable=True)
    order = order[torch.argsort(block[order], stable=True)]
    counts = torch.bincount(block)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(block)
    place[order] = torch.arange(len(block), device=block.device) - first[block[order]]
    return place


def masked_one_by_one(batch: TrainingBatch, fill: Tensor, turn: Tensor, copies: int, mask_id: int) -> TrainingBatch:
    """The batch with its masks filled, in `copies` versions of every noisy block; version c masks what has turn c.

    fill, turn: `(m,)`. The result's `select` holds the positions with `turn < copies`, in the batch's order. The first
    version takes the noisy tokens' own place in the row, the others stand behind it.
    """
    rows, length = batch.input_ids.shape
    noisy = batch.copy > 0
    width = int(noisy.sum(1).max())
    columns = torch.argsort(~noisy, dim=1, stable=True)[:, :width]  # (rows, width): a row's noisy columns
    filled = batch.input_ids.flatten().index_copy(0, batch.select, fill).view(rows, length)
    versions = copies - 1

    def append(grid: Tensor) -> Tensor:
        return torch.cat([grid, grid.gather(1, columns).repeat(1, versions)], 1)

    document = torch.where(noisy.gather(1, columns), batch.document.gather(1, columns), PADDING)
    number = batch.copy.gather(1, columns).repeat(1, versions)  # copies of a copy have numbers of their own
    number += (torch.arange(versions, device=fill.device).repeat_interleave(width) + 1) * int(batch.copy.max())

    asked = turn < copies
    row, column, place = batch.select[asked] // length, batch.select[asked] % length, turn[asked]
    slot = (noisy.cumsum(1) - 1)[row, column]
    total = length + versions * width
    select = row * total + torch.where(place == 0, column, length + (place - 1) * width + slot)
    input_ids = append(filled).flatten().index_fill(0, select, mask_id).view(rows, total)
    return TrainingBatch(
        input_ids=input_ids,
        document=torch.cat([batch.document, document.repeat(1, versions)], 1),
        copy=torch.cat([batch.copy, number], 1),
        position=append(batch.position),
        select=select,
        target=batch.target[asked],
        step=batch.step[asked],
        rank=batch.rank[asked],
        weight=batch.weight[asked],
        part=batch.part[asked],
        sequence=batch.sequence[asked],
        block=batch.block[asked],
        labelled=batch.labelled[asked],
        item=batch.item,
        block_size=batch.block_size,
    )


def _terms(hidden, weight, teacher_hidden, teacher_weight, target, mask_id: int, floor: float):
    """Reverse KL over the whole vocabulary, and log q(target), each `(m,)`."""
    logq = mask_free_logits(hidden, weight, mask_id).log_softmax(-1)
    logp = mask_free_logits(teacher_hidden, teacher_weight, mask_id).log_softmax(-1).clamp(min=floor)
    kl = logq.exp() * (logq.clamp(min=-1e4) - logp)  # the mask's -inf would make 0 * inf of the gradient
    return kl.sum(-1), logq.gather(-1, target[:, None]).squeeze(-1)
