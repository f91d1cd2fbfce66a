"""From trajectories to training batches: `[clean tokens | noisy copies of the blocks that hold response tokens]`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from t3d.blocks import CLEAN, PADDING, Layout, block_ids
from t3d.distill.config import T3DConfig
from t3d.distill.states import commit_rank, replace_with_random
from t3d.errors import T3DError
from t3d.trajectories import Trajectory


@dataclass
class TrainingBatch:
    """One forward's input and its `m` supervised positions (masked, and counted by the trajectory's length).

    input_ids, document, copy, position: `(rows, length)`, see `t3d.blocks.Layout`.
    select: flat index of each supervised position into rows * length; target: the trajectory's token there; rank: its
    commit rank in its block; weight: the state's weight; labelled: 1 where the target is part of a response verified
    as correct, else 0; sequence, block: numbers of the noisy sequence (a document's copy) and of the noisy block it is
    in, counted over the batch; all `(m,)`. item: each document's place in the dataset, `(documents,)`; -1: none.
    """

    input_ids: Tensor
    document: Tensor
    copy: Tensor
    position: Tensor
    select: Tensor
    target: Tensor
    rank: Tensor
    weight: Tensor
    labelled: Tensor
    sequence: Tensor
    block: Tensor
    item: Tensor
    block_size: int

    @property
    def layout(self) -> Layout:
        return Layout(self.document, self.copy, self.position, self.block_size)

    def to(self, device) -> "TrainingBatch":
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})


class StateDataset(Dataset):
    """Trajectories seen as fresh training states: item `i` depends only on (seed, epoch, i), so a resumed run sees
    what an uninterrupted one would."""

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
        if self.config.verified_only or self.config.drop_truncated or self.config.max_length:
            kept, dropped = [], {"not verified correct": 0, "cut at max_tokens": 0, "too long": 0}
            for i in given:
                trajectory = self.trajectories[i]
                tokens = len(trajectory.prompt_ids) + len(trajectory.response_ids)
                if self.config.verified_only and not trajectory.correct:
                    dropped["not verified correct"] += 1
                elif self.config.drop_truncated and trajectory.finish_reason == "length":
                    dropped["cut at max_tokens"] += 1
                elif self.config.max_length and tokens > self.config.max_length:
                    dropped["too long"] += 1
                else:
                    kept.append(i)
        if not len(kept):
            reasons = ", ".join(f"{n} {why}" for why, n in dropped.items() if n) or "there are none"
            raise T3DError(f"no trajectory is left to train on: {reasons}")
        return kept, dropped

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

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.config.seed, self.epoch, self.kept[item]])
        return self.states(self.trajectory(item), rng, item)

    def states(self, trajectory: Trajectory, rng: np.random.Generator, item: int = -1) -> dict:
        """One row's worth of tokens: the clean trajectory and `states_per_sequence` noisy states of it."""
        prompt = np.asarray(trajectory.prompt_ids, dtype=np.int64)
        response = np.asarray(trajectory.response_ids, dtype=np.int64)
        start = len(prompt)
        first = block_ids(start, self.block_size) * self.block_size  # where the first noisy block begins
        end = start + len(response)
        block = block_ids(np.arange(start, end), self.block_size)
        rank = commit_rank(block, np.asarray(trajectory.step_map), np.asarray(trajectory.confidence))
        counted = np.arange(len(response)) < trajectory.length
        supervised_too = counted | self.objective.beyond_length

        clean = np.concatenate([prompt, response])[: max(end - self.block_size, 0)]  # nobody sees a clean last block
        ids, copies, positions = [clean], [np.full(len(clean), CLEAN)], [np.arange(len(clean))]
        supervised = []
        for copy in range(1, self.config.states_per_sequence + 1):
            masked, weight = self.objective.state(block, rank, rng, self.config)
            noisy = replace_with_random(
                response, masked, self.objective.random_ratio(self.config), self.vocabulary, self.mask_id, rng
            )
            base = sum(map(len, ids)) + start - first  # where this copy's first response token lies in the row
            where = np.flatnonzero(masked & supervised_too)
            labelled = counted[where] * float(trajectory.correct is True)
            place = (np.full(len(where), copy), block[where])
            supervised.append((base + where, response[where], rank[where], weight[where], labelled, *place))
            ids.append(np.concatenate([prompt[first:], noisy]))
            copies.append(np.full(end - first, copy))
            positions.append(np.arange(first, end))
        columns = [np.concatenate(parts) for parts in zip(*supervised, strict=True)]
        select, target, rank, weight, labelled, copy, block = columns
        return {
            "item": item,
            "input_ids": np.concatenate(ids),
            "copy": np.concatenate(copies),
            "position": np.concatenate(positions),
            "select": select,
            "target": target,
            "rank": rank,
            "weight": weight,
            "labelled": labelled,
            "supervised_copy": copy,
            "supervised_block": block,
        }


def collate(examples: list[dict[str, np.ndarray]], pad_id: int, block_size: int, pack_length: int = 0) -> dict:
    """Put examples into rows, one each or packed up to `pack_length` tokens; the fields of a `TrainingBatch`.

    Document numbers are places in `examples`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    sizes = [len(example["input_ids"]) for example in examples]
    for i in sorted(range(len(examples)), key=lambda i: -sizes[i]):  # first-fit decreasing
        size = sizes[i]
        row = next((r for r, left in enumerate(room) if size <= left), None) if pack_length else None
        if row is None:
            rows.append([])
            room.append(pack_length)
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= size
    length = max(sum(sizes[i] for i in row) for row in rows)

    fill = {"input_ids": pad_id, "document": PADDING, "copy": CLEAN, "position": 0}
    grid = {name: np.full((len(rows), length), value, dtype=np.int64) for name, value in fill.items()}
    names = ("select", "target", "rank", "weight", "labelled", "sequence", "block")
    flat: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            example = examples[i]
            span = slice(at, at + len(example["input_ids"]))
            for name in ("input_ids", "copy", "position"):
                grid[name][r, span] = example[name]
            grid["document"][r, span] = i
            flat["select"].append(r * length + at + example["select"])
            for name in ("target", "rank", "weight", "labelled"):
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
