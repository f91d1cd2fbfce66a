"""From trajectories to training batches: `[clean tokens | noisy copies of the blocks that hold response tokens]`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from t3d.blocks import CLEAN, PADDING, Layout, block_ids
from t3d.distill.config import T3DConfig
from t3d.distill.sampler import Draw
from t3d.distill.states import Response, commit_rank, replace_with_random
from t3d.errors import T3DError
from t3d.trajectories import Trajectory

PER_POSITION = ("target", "step", "rank", "weight", "part", "labelled", "sequence", "block")  # fields of a batch


@dataclass
class TrainingBatch:
    """One forward's input and its `m` supervised positions (masked, and counted by the trajectory's length).

    input_ids, document, copy, position: `(rows, length)`, see `t3d.blocks.Layout`.
    select: flat index of each supervised position into rows * length; target: the trajectory's token there; step, rank:
    the step at which, and the place in the order in which, it was committed in its block; weight, part: the state's
    weight, and the term of the loss that it belongs to; labelled: 1 where the target is part of a stored response,
    through its stop, 0 where it is the student's own; sequence, block: numbers of the noisy sequence (a document's
    copy) and of the noisy block it is in, counted over the batch; all `(m,)`. item: each document's place in the
    dataset, `(documents,)`; -1: none.
    """

    input_ids: Tensor
    document: Tensor
    copy: Tensor
    position: Tensor
    select: Tensor
    target: Tensor
    step: Tensor
    rank: Tensor
    weight: Tensor
    part: Tensor
    labelled: Tensor
    sequence: Tensor
    block: Tensor
    item: Tensor
    block_size: int
    _masks: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def layout(self) -> Layout:
        return Layout(self.document, self.copy, self.position, self.block_size)

    def attention_mask(self, implementation: str):
        """`Layout.attention_mask`, made once for all models."""
        if implementation not in self._masks:
            self._masks[implementation] = self.layout.attention_mask(implementation)
        return self._masks[implementation]

    def to(self, device) -> "TrainingBatch":
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})


class StateDataset(Dataset):
    """Trajectories seen as fresh training states. An item depends only on the seed and on the `Draw` that asks for it
    (which trajectory, in which epoch, how far into training), so a resumed run sees what an uninterrupted one would.

    A plain index asks for the state of the current epoch, at the end of training.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        config: T3DConfig,
        block_size: int,
        mask_id: int,
        vocabulary: int,
    ):
        from t3d.distill.objectives import OBJECTIVES

        self.trajectories, self.config = trajectories, config
        self.block_size, self.mask_id, self.vocabulary = block_size, mask_id, vocabulary
        self.objective = OBJECTIVES[config.objective]
        self.kept, self.dropped = self._filter()
        self.trajectory(0)  # a wrong block size shows before anything is computed
        self.epoch = 0

    def _filter(self) -> tuple[Sequence[int], dict[str, int]]:
        given = range(len(self.trajectories))
        kept, dropped = given, {}
        config = self.config
        if config.verified_only or config.easy_share < 1 or config.drop_truncated or config.max_length:
            kept, dropped = [], {"not verified correct": 0, "of easy prompts": 0, "cut at max_tokens": 0, "too long": 0}
            hard = {t.prompt_id for t in self.trajectories if t.correct is False} if config.easy_share < 1 else ()
            for i in given:
                trajectory = self.trajectories[i]
                tokens = len(trajectory.prompt_ids) + len(trajectory.response_ids)
                if config.verified_only and not trajectory.correct:
                    dropped["not verified correct"] += 1
                elif config.easy_share < 1 and trajectory.prompt_id not in hard and not self._drawn(trajectory):
                    dropped["of easy prompts"] += 1
                elif config.drop_truncated and trajectory.finish_reason == "length":
                    dropped["cut at max_tokens"] += 1
                elif config.max_length and tokens > config.max_length:
                    dropped["too long"] += 1
                else:
                    kept.append(i)
        if not len(kept):
            reasons = ", ".join(f"{n} {why}" for why, n in dropped.items() if n) or "there are none"
            raise T3DError(f"no trajectory is left to train on: {reasons}")
        return kept, dropped

    def _drawn(self, trajectory: Trajectory) -> bool:
        """Whether the trajectory's prompt is in the `easy_share`, which is the same for all of its samples."""
        digest = hashlib.sha256(f"{self.config.seed}/{trajectory.prompt_id}".encode()).digest()
        return int.from_bytes(digest[:8], "little") < self.config.easy_share * 2**64

    def trajectory(self, item: int) -> Trajectory:
        trajectory = self.trajectories[self.kept[item]]
        if trajectory.block_size != self.block_size:
            raise T3DError(
                f"trajectory {trajectory.prompt_id!r} was decoded at block size {trajectory.block_size}, "
                f"but the model's is {self.block_size}; roll out again at {self.block_size}"
            )
        return trajectory

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, draw: Draw | int) -> dict[str, np.ndarray]:
        item, epoch, progress = draw if isinstance(draw, Draw) else Draw(draw, self.epoch, 1.0)
        rng = np.random.default_rng([self.config.seed, epoch, self.kept[item]])
        return self.states(self.trajectory(item), rng, item, progress)

    def states(self, trajectory: Trajectory, rng: np.random.Generator, item: int = -1, progress: float = 1.0) -> dict:
        """One row's worth of tokens: the clean trajectory and the objective's noisy states of it.

        progress: share of the training that is done, 0..1, for objectives that grow harder.
        """
        prompt = np.asarray(trajectory.prompt_ids, dtype=np.int64)
        response = np.asarray(trajectory.response_ids, dtype=np.int64)
        start = len(prompt)
        first = block_ids(start, self.block_size) * self.block_size  # where the first noisy block begins
        end = start + len(response)
        block = block_ids(np.arange(start, end), self.block_size)
        step = np.asarray(trajectory.step_map)
        rank = commit_rank(block, step, np.asarray(trajectory.confidence))
        counted = np.arange(len(response)) < trajectory.length
        supervised_too = counted | self.objective.beyond_length

        clean = np.concatenate([prompt, response])[: max(end - self.block_size, 0)]  # nobody sees a clean last block
        ids, copies, positions = [clean], [np.full(len(clean), CLEAN)], [np.arange(len(clean))]
        supervised = []
        states = self.objective.states(Response(block, step, rank), rng, self.config, progress)
        for copy, state in enumerate(states, start=1):
            noisy = replace_with_random(
                response, state.masked, self.objective.random_ratio(self.config), self.vocabulary, self.mask_id, rng
            )
            base = sum(map(len, ids)) + start - first  # where this copy's first response token lies in the row
            where = np.flatnonzero(state.supervised & supervised_too)
            supervised.append(
                {
                    "select": base + where,
                    "target": response[where],
                    "step": step[where],
                    "rank": rank[where],
                    "weight": state.weight[where],
                    "part": state.part[where],
                    "labelled": counted[where] * float(item >= 0),
                    "supervised_copy": np.full(len(where), copy),
                    "supervised_block": block[where],
                }
            )
            ids.append(np.concatenate([prompt[first:], noisy]))
            copies.append(np.full(end - first, copy))
            positions.append(np.arange(first, end))
        return {
            "item": item,
            "input_ids": np.concatenate(ids),
            "copy": np.concatenate(copies),
            "position": np.concatenate(positions),
            **{name: np.concatenate([columns[name] for columns in supervised]) for name in supervised[0]},
        }


def collate(examples: list[dict[str, np.ndarray]], pad_id: int, block_size: int, pack_length: int = 0) -> dict:
    """Put examples into rows of up to `pack_length` tokens (0: as many as the longest has): a batch's fields.

    An example is never split: one that is longer has a row of its own. Document numbers are places in `examples`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    sizes = [len(example["input_ids"]) for example in examples]
    pack_length = pack_length or max(sizes)
    for i in sorted(range(len(examples)), key=lambda i: -sizes[i]):  # first-fit decreasing
        size = sizes[i]
        row = next((r for r, left in enumerate(room) if size <= left), None)
        if row is None:
            rows.append([])
            room.append(pack_length)
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= size
    length = max(sum(sizes[i] for i in row) for row in rows)

    fill = {"input_ids": pad_id, "document": PADDING, "copy": CLEAN, "position": 0}
    grid = {name: np.full((len(rows), length), value, dtype=np.int64) for name, value in fill.items()}
    flat: dict[str, list[np.ndarray]] = {name: [] for name in ("select", *PER_POSITION)}
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            example = examples[i]
            span = slice(at, at + len(example["input_ids"]))
            for name in ("input_ids", "copy", "position"):
                grid[name][r, span] = example[name]
            grid["document"][r, span] = i
            flat["select"].append(r * length + at + example["select"])
            for name in PER_POSITION[:-2]:
                flat[name].append(example[name])
            flat["sequence"].append(np.stack([np.full(len(example["select"]), i), example["supervised_copy"]], 1))
            flat["block"].append(np.c_[flat["sequence"][-1], example["supervised_block"]])
            at = span.stop
    batch = {name: np.concatenate(parts) for name, parts in flat.items()}
    for name in ("sequence", "block"):
        batch[name] = np.unique(batch[name], axis=0, return_inverse=True)[1].reshape(-1)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in (grid | batch).items()}
    for name in ("weight", "labelled"):
        tensors[name] = tensors[name].float()
    tensors["item"] = torch.tensor([example["item"] for example in examples])
    return tensors | {"block_size": block_size}


def restate(batch: TrainingBatch, versions: list[Tensor], ask: Tensor) -> TrainingBatch:
    """The batch with its noisy blocks in other versions, of which only those that something is asked of are there.

    versions: input ids `(rows, length)` that differ at noisy tokens. ask: the version in which each supervised position
    is asked for, -1 for none, `(m,)`; the result's supervised positions are those asked for, in the batch's order.
    """
    rows, length = batch.input_ids.shape
    row, column = batch.select // length, batch.select % length
    noisy_block = ((batch.document * (batch.copy.max() + 1) + batch.copy) * length + batch.layout.block).flatten()
    copies = int(batch.copy.max())
    width = 0
    grid: dict[str, list[Tensor]] = {name: [] for name in ("input_ids", "document", "copy", "position")}
    select = torch.full_like(ask, -1)
    for number, ids in enumerate([batch.input_ids, *versions], start=-1):  # -1: the clean tokens
        here = ask == number
        wanted = batch.copy == CLEAN
        if number >= 0:
            wanted = ~wanted & torch.isin(noisy_block, noisy_block[batch.select[here]]).view(rows, length)
        most = int(wanted.sum(1).max())
        columns = torch.argsort(~wanted, dim=1, stable=True)[:, :most]  # those wanted, then filling
        filling = ~wanted.gather(1, columns)
        grid["input_ids"].append(ids.gather(1, columns))
        grid["document"].append(batch.document.gather(1, columns).masked_fill(filling, PADDING))
        grid["copy"].append((batch.copy.gather(1, columns) + max(number, 0) * copies).masked_fill(filling, CLEAN))
        grid["position"].append(batch.position.gather(1, columns))
        if number >= 0:
            select[here] = width + (wanted.cumsum(1) - 1)[row[here], column[here]]
        width += columns.shape[1]
    asked = ask >= 0
    return replace(
        batch,
        **{name: torch.cat(parts, 1) for name, parts in grid.items()},
        **{name: getattr(batch, name)[asked] for name in PER_POSITION},
        select=row[asked] * width + select[asked],
    )


def when_committed(batch: TrainingBatch, which: Tensor, mask_id: int) -> TrainingBatch:
    """The batch restated so that it asks for each of the supervised positions `which`, boolean `(m,)`, at the state in
    which its token was committed, in the batch's order.

    Version t of a noisy block shows, beside what it shows now, the tokens of the first t of the steps that occur among
    its `which`.
    """
    turn = _turns(batch.block[which], batch.step[which])
    where, target = batch.select[which], batch.target[which]
    versions = []
    for t in range(int(turn.max()) + 1 if len(turn) else 0):
        ids = batch.input_ids.flatten().index_copy(0, where, torch.where(turn < t, target, mask_id))
        versions.append(ids.view_as(batch.input_ids))
    return restate(batch, versions, torch.full_like(batch.part, -1).masked_scatter(which, turn))


def _turns(block: Tensor, step: Tensor) -> Tensor:
    """Number the steps that occur in each block 0, 1, ... without gaps, `(m,)`; block, step: `(m,)`."""
    width = int(step.max()) + 1 if len(step) else 1
    pairs, inverse = (block * width + step).unique(return_inverse=True)
    count = torch.bincount(pairs // width)
    return (torch.arange(len(pairs), device=block.device) - (count.cumsum(0) - count)[pairs // width])[inverse]
