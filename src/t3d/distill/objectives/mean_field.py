"""`mean_field`: reverse KL from one student step to the teacher's joint over the block, by coordinates (ours).

One denoising step is a factorised distribution `q = prod q_i` over the masked positions M. What few-step decoding
wants is the q closest to the teacher's joint p in KL(q || p), and for a factorised q that gradient is exact without
REINFORCE, the coordinate identity of mean-field variational inference (Bishop 2006, section 10.1):

    grad KL(q || p) = sum_{i in M} E_{x_{M\\i} ~ q} [ grad KL(q_i || p(. | state, x_{M\\i})) ]

`p(. | state, x_{M\\i})` is the teacher predicting one masked position among filled ones, a state it knows well.

The reverse KL of a coordinate has next to no gradient where q_i is sure of a token that p rules out: it is q_i(v) times
something, and q_i(v) is small for the right v. There forward KL has the gradient of a cross-entropy, and where q_i is
near p the two agree; so a share `mf_forward` of it is mixed in. At 0 the gradient is the identity's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from t3d.components import setting
from t3d.distill.batch import TrainingBatch, restate
from t3d.distill.logprobs import WHOLE_CHUNK, choose_tokens, in_chunks, mask_free_logits
from t3d.distill.objective import AnyStates, Ask, OnPolicy, Privileged, mean, other_default, register
from t3d.distill.objectives.soft import kl


@register("mean_field")
@dataclass(frozen=True)
class MeanField(AnyStates, Privileged, OnPolicy):
    """`L = mean_i [(1 - w) KL(q_i || p) + w KL(p || q_i)] + mf_anchor * CE to the trajectories`, w = `mf_forward`.

    `p = p(. | state, x_{M\\i})`, its logarithm in KL(q_i || p) at least `mf_floor`.
    The masked positions are filled with the student's own choice (argmax, or a sample at `mf_temperature`); copy `c` of
    a noisy block masks its c-th one again; one teacher forward over all copies gives every conditional.
    """

    beyond_length = True  # the teacher's conditionals need no labels, so what follows the stop is learned too

    on_policy_share: float = other_default(OnPolicy, "on_policy_share", 0.5)
    mf_anchor: float = setting(0.5, "weight of the cross-entropy to the trajectories; 0: none")
    mf_copies: int = setting(0, "teacher copies of each block per step; 0: one for every masked position", low=0)
    mf_forward: float = setting(
        0.3,
        "share of forward KL in the divergence; it teaches a student that is sure of a wrong token",
        low=0,
        high=1,
        before=0.0,
    )
    mf_floor: float = setting(-12.0, "lowest teacher log-probability that counts")
    mf_temperature: float = setting(
        0.0, "masks are filled with the student's samples at this temperature; 0: its argmax", low=0
    )

    def loss(self, batch: TrainingBatch, ask: Ask):
        hidden, weight = ask.student(lambda h, w: (h, w))
        fill = choose_tokens(hidden.detach(), weight.detach(), ask.mask_id, self.mf_temperature)
        turn = place_in_block(batch.block, shuffle=self.mf_copies > 0)
        copies = self.mf_copies or int(turn.max()) + 1
        asked = turn < copies
        teacher_hidden, teacher_weight = ask.reference(
            lambda h, w: (h, w), masked_one_by_one(batch, fill, turn, copies, ask.mask_id)
        )
        divergence, logq = in_chunks(
            lambda h, t, x: _terms(h, weight, t, teacher_weight, x, ask.mask_id, self.mf_forward, self.mf_floor),
            hidden[asked],
            teacher_hidden,
            batch.target[asked],
            chunk=WHOLE_CHUNK,
        )
        kl, anchor = mean(divergence, weights := batch.weight[asked]), -mean(logq, batch.labelled[asked] * weights)
        return kl + self.mf_anchor * anchor, {"loss/kl": kl.detach(), "loss/anchor": anchor.detach()}


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
    """The batch with its masks filled, in `copies` versions of each noisy block; version c masks what has turn c.

    fill, turn: `(m,)`. The result's supervised positions are those with `turn < copies`, in the batch's order. The
    blocks of a group before the one that is asked are filled, too.
    """
    filled = batch.input_ids.flatten().index_copy(0, batch.select, fill)
    depth = (batch.layout.block - batch.group).flatten()[batch.select]  # blocks of the group before
    number = torch.where(turn < copies, depth * copies + turn, -1)
    count = int(number.max()) + 1 if len(number) else 0
    versions = [filled.index_fill(0, batch.select[number == v], mask_id).view_as(batch.input_ids) for v in range(count)]
    return restate(batch, versions, number)


def _terms(hidden, weight, teacher_hidden, teacher_weight, target, mask_id: int, forward: float, floor: float):
    """The divergence over the whole vocabulary, and log q(target), each `(m,)`."""
    logq = mask_free_logits(hidden, weight, mask_id).log_softmax(-1)
    logp = mask_free_logits(teacher_hidden, teacher_weight, mask_id).log_softmax(-1)
    finite = logq.clamp(min=-1e4)  # the mask's -inf would make 0 * inf of the gradient
    divergence = (1 - forward) * kl(finite, logp.clamp(min=floor))
    if forward:
        divergence = divergence + forward * kl(logp.clamp(min=-1e4), finite)
    return divergence, logq.gather(-1, target[:, None]).squeeze(-1)
