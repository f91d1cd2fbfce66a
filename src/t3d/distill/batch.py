"""A training batch: `[clean tokens | noisy copies of the blocks that hold response tokens]`, and its other versions."""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from t3d.blocks import CLEAN, PADDING, Layout


def _each():
    """A column: one value for each supervised position, 0 where an example has none."""
    return field(metadata={"column": True})


@dataclass
class TrainingBatch:
    """One forward's input and its `m` supervised positions (masked, and counted by the trajectory's length).

    input_ids, document, copy, position, group: `(rows, length)`, see `t3d.blocks.Layout`.
    select: flat index of each supervised position into rows * length. Of each, `(m,)`: target: the trajectory's token;
    step, rank: the step at which, and the place in the order in which, it was committed in its block; weight: what it
    counts in the loss; part: the term of the loss that it belongs to; stop: 1 where it ends the response; labelled: 1
    where the target is part of a stored response, through its stop, 0 where it is the student's own; sequence, block:
    numbers of the noisy sequence (a document's copy) and of the noisy block it is in, counted over the batch;
    advantage: what its answer is worth beside others to the prompt; old_logp: its log-probability when it was sampled.
    item: each document's place in the dataset, `(documents,)`; -1: none.
    prompt, answered: for a reference that sees the answers, how many tokens each document's prompt has, `(documents,)`,
    and the ids of the prompt that it sees instead, `(documents, longest)`, -1 behind its end.
    """

    input_ids: Tensor
    document: Tensor
    copy: Tensor
    position: Tensor
    group: Tensor
    select: Tensor
    target: Tensor = _each()
    step: Tensor = _each()
    rank: Tensor = _each()
    weight: Tensor = _each()
    part: Tensor = _each()
    stop: Tensor = _each()
    labelled: Tensor = _each()
    sequence: Tensor = _each()
    block: Tensor = _each()
    advantage: Tensor = _each()
    old_logp: Tensor = _each()
    item: Tensor
    block_size: int
    full: bool = False  # attention, see `t3d.blocks.geometry`
    prompt: Tensor | None = None
    answered: Tensor | None = None
    _masks: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def layout(self) -> Layout:
        size = None if self.full else self.block_size
        return Layout(self.document, self.copy, self.position, size, self.group)

    @cached_property
    def tokens(self) -> int:
        """How many there are, padding not counted; asked several times in a step, and each time a GPU would be waited
        for."""
        return int((self.document != PADDING).sum())

    def attention_mask(self, implementation: str):
        """`Layout.attention_mask`, made once for all models."""
        if implementation not in self._masks:
            self._masks[implementation] = self.layout.attention_mask(implementation)
        return self._masks[implementation]

    def to(self, device) -> "TrainingBatch":
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})


COLUMNS = tuple(f.name for f in fields(TrainingBatch) if "column" in f.metadata)
GRID = ("input_ids", "document", "copy", "position", "group")  # `(rows, length)`
FILL = {"document": PADDING, "copy": CLEAN, "position": 0, "group": 0}  # where a row has no token


def collate(
    examples: list[dict[str, np.ndarray]], pad_id: int, block_size: int | None, pack_length: int = 0, full: bool = False
) -> dict:
    """Put examples into rows of up to `pack_length` tokens (0: as many as the longest has): a batch's fields.

    An example is never split: one that is longer has a row of its own. Document numbers are places in `examples`.
    block_size: with full attention the largest of the examples', since it may be any.
    """
    if full:
        block_size = max(example["block_size"] for example in examples)
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

    fill = {"input_ids": pad_id} | FILL
    grid = {name: np.full((len(rows), length), value, dtype=np.int64) for name, value in fill.items()}
    given = [name for name in COLUMNS if name not in ("sequence", "block")]
    flat: dict[str, list[np.ndarray]] = {name: [] for name in ("select", *COLUMNS)}
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            example = examples[i]
            span = slice(at, at + len(example["input_ids"]))
            for name in GRID:
                grid[name][r, span] = i if name == "document" else example[name]
            flat["select"].append(r * length + at + example["select"])
            for name in given:
                flat[name].append(example.get(name, np.zeros(len(example["select"]))))
            flat["sequence"].append(np.stack([np.full(len(example["select"]), i), example["supervised_copy"]], 1))
            flat["block"].append(np.c_[flat["sequence"][-1], example["supervised_block"]])
            at = span.stop
    batch = {name: np.concatenate(parts) for name, parts in flat.items()}
    for name in ("sequence", "block"):
        batch[name] = np.unique(batch[name], axis=0, return_inverse=True)[1].reshape(-1)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in (grid | batch).items()}
    for name in (name for name, values in tensors.items() if values.is_floating_point()):
        tensors[name] = tensors[name].float()
    tensors["item"] = torch.tensor([example["item"] for example in examples])
    if "answered" in examples[0]:
        prompts = [torch.from_numpy(example["answered"]) for example in examples]
        tensors["answered"] = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=-1)
        tensors["prompt"] = torch.tensor([example["prompt"] for example in examples])
    return tensors | {"block_size": block_size, "full": full}


def restate(batch: TrainingBatch, versions: list[Tensor], ask: Tensor) -> TrainingBatch:
    """The batch with its noisy groups in other versions, of which only what is asked or seen by that is there.

    versions: input ids `(rows, length)` that differ at noisy tokens. ask: the version in which each supervised position
    is asked for, -1 for none, `(m,)`; the result's supervised positions are those asked for, in the batch's order.
    """
    rows, length = batch.input_ids.shape
    row, column = batch.select // length, batch.select % length
    block = batch.layout.block
    numbers = (batch.document * (batch.copy.max() + 1) + batch.copy) * length + batch.group
    groups, group = numbers.flatten().unique(return_inverse=True)
    copies = int(batch.copy.max())
    width = 0
    grid: dict[str, list[Tensor]] = {name: [] for name in GRID}
    select = torch.full_like(ask, -1)
    for number, ids in enumerate([batch.input_ids, *versions], start=-1):  # -1: the clean tokens
        here = ask == number
        wanted = batch.copy == CLEAN
        if number >= 0:
            asked = batch.select[here]
            last = torch.full_like(groups, -1).scatter_reduce(0, group[asked], block.flatten()[asked], "amax")
            wanted = ~wanted & (block <= last[group].view(rows, length))
        most = int(wanted.sum(1).max())
        columns = torch.argsort(~wanted, dim=1, stable=True)[:, :most]  # those wanted, then filling
        filling = ~wanted.gather(1, columns)
        part = {name: getattr(batch, name).gather(1, columns) for name in GRID} | {"input_ids": ids.gather(1, columns)}
        part["document"] = part["document"].masked_fill(filling, PADDING)
        part["copy"] = (part["copy"] + max(number, 0) * copies).masked_fill(filling, CLEAN)
        for name in GRID:
            grid[name].append(part[name])
        if number >= 0:
            select[here] = width + (wanted.cumsum(1) - 1)[row[here], column[here]]
        width += columns.shape[1]
    asked = ask >= 0
    return replace(
        batch,
        **{name: torch.cat(parts, 1) for name, parts in grid.items()},
        **{name: getattr(batch, name)[asked] for name in COLUMNS},
        select=row[asked] * width + select[asked],
    )


def when_committed(batch: TrainingBatch, which: Tensor, mask_id: int) -> TrainingBatch:
    """The batch restated so that it asks for each of the supervised positions `which`, boolean `(m,)`, at the state in
    which its token was committed, in the batch's order; what stands before its block is then final, in a group too.

    Version t of a noisy block shows, beside what it shows now, the tokens of the first t of the steps that occur among
    its `which`.
    """
    turn = _turns(batch.block[which], batch.step[which])
    where, target = batch.select[which], batch.target[which]
    versions = []
    for t in range(int(turn.max()) + 1 if len(turn) else 0):
        ids = batch.input_ids.flatten().index_copy(0, where, torch.where(turn < t, target, mask_id))
        versions.append(ids.view_as(batch.input_ids))
    alone = replace(batch, group=batch.layout.block)
    return restate(alone, versions, torch.full_like(batch.part, -1).masked_scatter(which, turn))


def with_answers(batch: TrainingBatch) -> TrainingBatch:
    """The batch, or a version of it, with the prompts `answered` in place of its own; same supervised positions.

    What follows a prompt moves by whole blocks, so that every state stays what it is. For that the new prompt's first
    block may lack places at its beginning: positions count by their differences and by their blocks alone.
    """
    rows, length = batch.input_ids.shape
    size, prompts = batch.block_size, batch.answered
    more = (prompts >= 0).sum(1) - batch.prompt  # tokens that the new prompt has more, (documents,)
    first = -more % size  # position of its first token
    grid = {name: getattr(batch, name) for name in GRID}
    real, document = batch.document != PADDING, batch.document.clamp(min=0)
    place = batch.position + more[document]  # in the new prompt, of what lies in the old one
    inside = real & (batch.position < batch.prompt[document])
    ids = prompts[document, place.clamp(0, prompts.shape[1] - 1)]
    grid["input_ids"] = torch.where(inside, ids, batch.input_ids)
    shift = (more + first)[document] * real
    grid["position"] = batch.position + shift
    grid["group"] = batch.group + shift // size
    gone = inside & (place < 0)
    for name, value in FILL.items():
        grid[name] = grid[name].masked_fill(gone, value)

    # The tokens that it begins with and the old one has no place for stand in front of the row
    row_of = torch.zeros_like(more).index_put_((document[real],), real.nonzero()[:, 0])
    number, place = (torch.arange(prompts.shape[1], device=more.device) < more[:, None]).nonzero(as_tuple=True)
    order = torch.argsort(row_of[number], stable=True)
    number, place = number[order], place[order]
    row = row_of[number]
    count = torch.bincount(row, minlength=rows)
    width = int(count.max())
    column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    position = place + first[number]
    front = {"input_ids": prompts[number, place], "document": number, "copy": torch.full_like(number, CLEAN)}
    front |= {"position": position, "group": position // size}
    for name in GRID:
        empty = torch.full((rows, width), FILL.get(name, 0), device=row.device)
        grid[name] = torch.cat([empty.index_put_((row, column), front[name]), grid[name]], 1)
    select = batch.select + (batch.select // length + 1) * width
    return replace(batch, **grid, select=select, prompt=None, answered=None)


def _turns(block: Tensor, step: Tensor) -> Tensor:
    """Number the steps that occur in each block 0, 1, ... without gaps, `(m,)`; block, step: `(m,)`."""
    width = int(step.max()) + 1 if len(step) else 1
    pairs, inverse = (block * width + step).unique(return_inverse=True)
    count = torch.bincount(pairs // width)
    return (torch.arange(len(pairs), device=block.device) - (count.cumsum(0) - count)[pairs // width])[inverse]
