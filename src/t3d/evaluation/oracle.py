"""How few forwards an answer could take: what a decoder that knew the answer would make of this model's predictions.

The reference is what the model writes one token a step (`low_confidence_static`, as many steps as a block has tokens,
greedy). The oracle commits, at each forward, any of the masked places whose likeliest token is the reference's; its
choice is free, its tokens are the model's own, one block is in flight. The fewest forwards that write the reference,
whole blocks of it, bound what any unmasking strategy can reach without changing the answer.
"""

import json
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from t3d.blocks import CLEAN, PADDING, Layout, block_start, check_blocks
from t3d.decoding.config import DecodingConfig
from t3d.decoding.guarantee import reference_setting
from t3d.disk import write_whole
from t3d.errors import T3DError
from t3d.evaluation.rows import EvalRow
from t3d.evaluation.runner import evaluate
from t3d.tasks import Problem
from t3d.trajectories import Trajectory, TrajectoryDataset

EXACT = 8  # longest block whose states are all searched; beyond, every place that agrees is committed
NOISY = 256  # masked and committed tokens of one row, besides the clean ones
STORED = "oracle.json"  # beside the reference's answers: problem id -> forwards
TPF = "oracle_tpf"  # key of EvalRow.extra


def oracle(model, trajectories: Sequence[Trajectory], batch_size: int = 16) -> list[int]:
    """Fewest forwards that write each of these reference answers.

    Blocks of up to `EXACT` tokens are searched in full. In longer ones every place that agrees is committed, which is
    an upper bound: a token more can also change other predictions for the worse. Where nothing agrees (after such a
    choice, or where rounding undoes a tie that decoding broke), a block counts as many forwards as it has tokens.

    batch_size: rows of a forward, each an answer's clean tokens and up to `NOISY` tokens of states of its blocks. The
    states of all blocks are computed side by side, for the reference is the context of each.

    Raises:
        T3DError: for a model of full attention.
    """
    check_blocks(model.config, "the oracle")
    forwards = [0] * len(trajectories)
    searches = []
    for index, t in enumerate(trajectories):
        first = t.origin + len(t.prompt_ids)  # positions
        end = first + len(t.response_ids)
        for start in range(block_start(first, t.block_size), end, t.block_size):
            given, size = max(0, first - start), min(t.block_size, end - start)  # an anchored last block may be short
            searches.append((index, start, fewest((1 << given) - 1, size, exact=size <= EXACT), None))
    while searches:
        going = []
        for index, start, turns, answer in searches:
            try:
                going.append((index, start, turns, turns.send(answer)))
            except StopIteration as done:
                forwards[index] += done.value
        asked = [(index, start, state) for index, start, _, states in going for state in states]
        answers = iter(agreement(model, trajectories, asked, batch_size))
        searches = [(index, start, turns, [next(answers) for _ in states]) for index, start, turns, states in going]
    return forwards


def fewest(given: int, size: int, exact: bool = True) -> Generator[list[int], list[int], int]:
    """Search for the fewest forwards that fill a block; a state is a number whose i-th bit says that place i is filled.

    Yields the states that a forward is to be asked about, takes for each the masked places that agree with the
    reference, and returns the forwards from the state `given` on. exact: any places that agree may be committed, else
    all are. Where no way is found it is one place at a time, which is how the reference was written.
    """
    full = (1 << size) - 1
    most = (full & ~given).bit_count()
    states, seen = [given], {given}
    for forwards in range(1, most):
        reached = set()
        for state, agree in zip(states, (yield states), strict=True):
            if state | agree == full:
                return forwards
            chosen = agree
            while chosen:
                reached.add(state | chosen)
                chosen = (chosen - 1) & agree if exact else 0
        states = sorted(reached - seen)
        seen |= reached
        if not states:
            break
    return most


@torch.inference_mode()
def agreement(
    model, trajectories: Sequence[Trajectory], asked: list[tuple[int, int, int]], batch_size: int
) -> list[int]:
    """Of each state the masked places whose likeliest token is the answer's, as bits.

    asked: (trajectory, position where the block starts, filled places as bits), those of one trajectory together.
    """
    rows: list[list[int]] = []  # indices into `asked`
    for i, (index, _, _) in enumerate(asked):
        size = trajectories[index].block_size
        if not rows or asked[rows[-1][0]][0] != index or (len(rows[-1]) + 1) * size > max(NOISY, size):
            rows.append([])
        rows[-1].append(i)
    mask_id = model.config.mask_token_id
    parts = [_row(trajectories[asked[row[0]][0]], [asked[i][1:] for i in row], mask_id) for row in rows]
    order = sorted(range(len(rows)), key=lambda r: len(parts[r][0]))  # rows of like length together
    found = [0] * len(asked)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        agree = _forward(model, [parts[r] for r in batch], trajectories[asked[rows[batch[0]][0]][0]].block_size)
        for r, bits in zip(batch, agree, strict=True):
            for i, value in zip(rows[r], bits, strict=True):
                found[i] = value
    return found


def _row(t: Trajectory, states: list[tuple[int, int]], mask_id: int) -> tuple[np.ndarray, ...]:
    """ids, copy, position and target of `[clean tokens | a copy of a block per state]`; target -1: not asked."""
    whole, begin = np.array([*t.prompt_ids, *t.response_ids], dtype=np.int64), t.origin
    blocks = [np.arange(start, min(start + t.block_size, begin + len(whole))) for start, _ in states]
    filled = np.array(
        [state >> place & 1 for (_, state), block in zip(states, blocks, strict=True) for place in range(len(block))],
        dtype=bool,
    )
    clean = max(start for start, _ in states) - begin  # what comes later nobody sees
    position = np.concatenate(blocks)
    token = whole[position - begin]
    copies = np.repeat(np.arange(1, len(states) + 1), list(map(len, blocks)))
    return (
        np.concatenate([whole[:clean], np.where(filled, token, mask_id)]),
        np.concatenate([np.full(clean, CLEAN), copies]),
        np.concatenate([np.arange(begin, begin + clean), position]),
        np.concatenate([np.full(clean, -1), np.where(filled, -1, token)]),
    )


def _forward(model, rows: list[tuple[np.ndarray, ...]], size: int) -> list[list[int]]:
    """Of each row, of each state: the masked places that agree, as bits."""
    length = max(len(row[0]) for row in rows)
    ids, copy, position, target = (
        torch.from_numpy(np.stack([np.pad(row[k], (0, length - len(row[k])), constant_values=fill) for row in rows]))
        for k, fill in enumerate((0, CLEAN, 0, -1))
    )
    lengths = torch.tensor([len(row[0]) for row in rows])
    document = torch.where(torch.arange(length) < lengths[:, None], torch.arange(len(rows))[:, None], PADDING)
    select, device = (target >= 0).flatten().nonzero()[:, 0], model.device
    layout = Layout(document.to(device), copy.to(device), position.to(device), size)
    shift = getattr(model.config, "logits_shift", 0)
    logits = model(
        input_ids=ids.to(device),
        attention_mask=layout.attention_mask(model.config._attn_implementation),
        position_ids=layout.position,
        select=layout.predictors(select.to(device), shift),
    )  # (asked places, vocab)
    logits[:, model.config.mask_token_id] = -torch.inf  # no decoder ever writes it
    right = torch.zeros(ids.numel(), dtype=torch.bool)
    right[select] = logits.argmax(-1).cpu() == target.flatten()[select]
    agree = []
    for row, places in zip(rows, right.view(ids.shape), strict=True):
        states = (places[: len(row[0])][row[1] == copy] for copy in range(1, row[1].max() + 1))
        agree.append([sum(1 << place for place in state.nonzero()[:, 0].tolist()) for state in states])
    return agree


def add_oracle(
    rows: list[EvalRow], model, tokenizer, task, problems: list[Problem], config: DecodingConfig, output: Path, **about
) -> list[EvalRow]:
    """The rows of one model with the oracle's tokens per forward, at their block size, as `extra["oracle_tpf"]`.

    The reference answers are decoded where `output`, the folder of the evaluation, does not hold them; what was
    searched is kept beside them. config: for `max_tokens` and the seed. about: as for `evaluate`.
    """
    found = {}
    for size in {row.block_size for row in rows}:
        plain = reference_setting(DecodingConfig(max_tokens=config.max_tokens, seed=config.seed).at(size))
        [reference] = evaluate(
            model, tokenizer, task, problems, [replace(plain, block_size=size)], output=output, **about
        )
        found[size] = oracle_tpf(model, output / reference.results, {problem.id for problem in problems})
    return [replace(row, extra=row.extra | {TPF: found[row.block_size]}) for row in rows]


def oracle_tpf(model, folder: Path, wanted: set[str], together: int = 64) -> float:
    """The oracle's tokens per forward over the reference answers in `folder` to the problems `wanted`.

    Kept in the folder, `together` answers at a time, and not searched again.
    """
    path = folder / STORED
    try:
        known: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise T3DError(f"cannot read {path}; remove it to search again") from error
    answers = TrajectoryDataset(folder)
    keys = answers.keys()
    mine = [i for i, (problem, sample) in enumerate(keys) if problem in wanted and sample == 0]
    todo = [i for i in mine if keys[i][0] not in known]
    for first in range(0, len(todo), together):
        some = todo[first : first + together]
        forwards = oracle(model, [answers[i] for i in some])
        known |= {keys[i][0]: n for i, n in zip(some, forwards, strict=True)}
        write_whole(path, json.dumps(known) + "\n")
    lengths = answers.column("length")
    return sum(lengths[i] for i in mine) / sum(known[keys[i][0]] for i in mine)
