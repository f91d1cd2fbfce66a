"""From trajectories to the examples that batches are made of."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from torch.utils.data import Dataset

from t3d.blocks import CLEAN, block_ids, block_start
from t3d.distill.config import T3DConfig
from t3d.distill.sampler import Draw
from t3d.distill.states import Response, commit_rank, draw_groups, replace_with_random, step_index
from t3d.errors import T3DError
from t3d.trajectories import Trajectory


class StateDataset(Dataset):
    """Trajectories seen as fresh training states. An item depends only on the seed and on the `Draw` that asks for it
    (which trajectory, in which epoch, how far into training), so a resumed run sees what an uninterrupted one would.

    A plain index asks for the state of the current epoch, at the end of training.
    answer_prompts: gives the prompt of a trajectory as a reference sees it that is shown the answer.
    anchored, full: the model's, see `t3d.blocks.geometry`; with full attention trajectories say how large blocks are.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        config: T3DConfig,
        block_size: int | None,
        mask_id: int,
        vocabulary: int,
        answer_prompts: Callable[[Trajectory], list[int]] | None = None,
        anchored: bool = False,
        full: bool = False,
    ):
        self.trajectories, self.config = trajectories, config
        self.block_size, self.mask_id, self.vocabulary = block_size, mask_id, vocabulary
        self.anchored, self.full = anchored, full
        self.objective = config.method
        self.answer_prompts = answer_prompts
        self.kept, self.dropped = self._filter()
        if full:
            self.block_size = trajectories[self.kept[0]].block_size
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
        if trajectory.anchored != self.anchored or (trajectory.canvas > 0) != self.full:
            raise T3DError(
                f"trajectory {trajectory.prompt_id!r} was decoded by a model of another family, whose blocks begin "
                "elsewhere or see more; roll out again with this one"
            )
        if trajectory.block_size != self.block_size and not self.full:
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

        With full attention there is nothing clean, since all that is clean sees what is noisy: every state is the whole
        text as the decoder saw it in one block, drawn at random; what lies behind that is masked.
        progress: share of the training that is done, 0..1, for objectives that grow harder.
        """
        prompt = np.asarray(trajectory.prompt_ids, dtype=np.int64)
        response = np.asarray(trajectory.response_ids, dtype=np.int64)
        origin, size = trajectory.origin, trajectory.block_size
        start = origin + len(prompt)  # positions
        first = origin if self.full else block_start(start, size)  # where a noisy copy begins
        end = start + len(response)
        block = block_ids(np.arange(start, end), size)
        step = np.asarray(trajectory.step_map)
        rank = commit_rank(block, step, np.asarray(trajectory.confidence))
        counted = np.arange(len(response)) < trajectory.length
        supervised_too = counted | self.objective.beyond_length

        last = first if self.full else block_start(end - 1, size)  # nobody sees a clean last block
        clean = np.concatenate([prompt, response])[: max(last - origin, 0)]
        ids, copies, positions = [clean], [np.full(len(clean), CLEAN)], [origin + np.arange(len(clean))]
        groups = [block_ids(positions[0], size)]
        tail = np.full(start - first, block[0] if len(block) else 0)  # the prompt's, in the first noisy block
        behind = np.full(max(trajectory.canvas - len(response), 0), self.mask_id)
        supervised = []
        weight = self._weights(block, step, rank)
        stop = np.arange(len(response)) == (trajectory.length - 1 if trajectory.finish_reason == "stop" else -1)
        weight[stop] *= self.objective.stop_weight
        group = block if self.objective.group_size == 1 else draw_groups(block, self.objective.group_size, rng)
        states = self.objective.states(Response(block, step, rank, group), rng, progress)
        for copy, state in enumerate(states, start=1):
            noisy = replace_with_random(
                response, state.masked, self.objective.random_ratio, self.vocabulary, self.mask_id, rng
            )
            base = sum(map(len, ids)) + start - first  # where this copy's first response token lies in the row
            learned = state.supervised & supervised_too
            if self.full:
                one = rng.choice(np.unique(block[learned])) if learned.any() else block[-1]
                learned &= block == one
                noisy = np.where(block < one, response, np.where(block > one, self.mask_id, noisy))
            where = np.flatnonzero(learned)
            supervised.append(
                {
                    "select": base + where,
                    "target": response[where],
                    "step": step[where],
                    "rank": rank[where],
                    "weight": (state.weight * weight)[where],
                    "part": state.part[where],
                    "stop": stop[where].astype(np.int64),
                    "labelled": counted[where] * float(item >= 0),
                    "supervised_copy": np.full(len(where), copy),
                    "supervised_block": block[where],
                }
            )
            ids.append(np.concatenate([prompt[first - origin :], noisy, behind]))
            copies.append(np.full(len(ids[-1]), copy))
            positions.append(first + np.arange(len(ids[-1])))
            groups.append(np.zeros(len(ids[-1]), dtype=np.int64) if self.full else np.concatenate([tail, group]))
        seen = {}
        if self.answer_prompts is not None:
            answered = np.asarray(self.answer_prompts(trajectory), dtype=np.int64)
            seen = {"prompt": len(prompt), "answered": answered}
        return seen | {
            "item": item,
            "block_size": size,
            "input_ids": np.concatenate(ids),
            "copy": np.concatenate(copies),
            "position": np.concatenate(positions),
            "group": np.concatenate(groups),
            **{name: np.concatenate([columns[name] for columns in supervised]) for name in supervised[0]},
        }

    def _weights(self, block: np.ndarray, step: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """What each response token counts by when it was committed, `(n,)`."""
        if not self.objective.late_weight:
            return np.ones(len(block))
        when = rank if self.objective.late_by == "rank" else step_index(block, step)[0]
        _, place = np.unique(block, return_inverse=True)
        last = np.zeros(place.max() + 1)
        np.maximum.at(last, place, when)
        return 1 + self.objective.late_weight * when / np.maximum(last, 1)[place]
