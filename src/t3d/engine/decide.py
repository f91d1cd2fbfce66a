"""Policies decide on a batch of block rows: a token is drawn for each place that was asked; what is lawful is done."""

import numpy as np
import torch
from torch import Tensor

from t3d.decoding.flight import Row
from t3d.decoding.laws import lawful
from t3d.decoding.logprobs import logprobs
from t3d.decoding.policy import ENTROPY, FILLED, MARGIN, SHADOW, STOP, UNIFORM, Knobs, Policy, View
from t3d.decoding.sampling import sample, uniform
from t3d.engine.attention import to_device
from t3d.engine.request import Sequence
from t3d.errors import T3DError


class Logits:
    """Those of one forward, float32 (n, vocab) on the model's device; the mask is never an answer."""

    def __init__(self, values: Tensor, mask_id: int):
        self.values = values
        self.values[:, mask_id] = -torch.inf

    def rows(self, index: np.ndarray) -> Tensor:
        """Those rows; all of them, in order, without a copy."""
        n = len(self.values)
        if len(index) == n and (index == np.arange(n)).all():
            return self.values
        return self.values[to_device(index, self.values.device)]


def decide(rows: list[tuple[Sequence, Row]], logits: Logits) -> list[tuple[Sequence, T3DError]]:
    """Let each row's policy decide, and change the rows' blocks in place.

    Only what was drawn comes to the host: token, confidence, perhaps entropy of each place. Returns the sequences whose
    logits are not numbers, each with an error that names it; what is done to those is worthless, the others are not
    touched by it.
    """
    batch = _Batch(rows, logits)
    view = batch.view()
    failed = {id(sequence) for sequence, _ in batch.failures}
    asking = [(row, row.block.tokens.copy()) for s, row in rows if s.request.logprobs is not None and not row.draft]
    groups: dict[type[Policy], list[int]] = {}
    for number, (sequence, _) in enumerate(rows):
        groups.setdefault(type(sequence.policy), []).append(number)
    for kind, mine in groups.items():
        some = view if len(groups) == 1 else view.rows(torch.tensor(mine))
        memory = batch.memory(kind, mine)
        chosen = lawful(
            kind.decide(rows[mine[0]][0].policy, some, batch.knobs(kind, mine), memory),
            some,
            batch.mask_id,
            lambda mine=mine: batch.revisions(mine),
            kind.most_revisions,
        )
        batch.keep(kind, mine, memory)
        drawn = {name: getattr(some, name) for name in ("proposal", "confidence", "certainty")}
        arrays = {name: None if x is None else x.numpy() for name, x in (vars(chosen) | drawn).items()}
        for place, number in enumerate(mine):
            if id(rows[number][0]) not in failed:
                _apply(*rows[number], place, **arrays)
    if asking:
        _note(asking, logits)
    return batch.failures


def _note(asking: list[tuple[Row, np.ndarray]], logits: Logits) -> None:
    """The log-probabilities of what was committed, with each row its block's tokens before. Those of the forward, not
    what a policy or the sampling made of them."""
    places = [((r.block.tokens != before) & ~r.block.masked()).nonzero()[0] for r, before in asking]
    index = np.concatenate([row.logits[mine] for (row, _), mine in zip(asking, places, strict=True)])
    if not len(index):
        return
    tokens = np.concatenate([row.block.tokens[mine] for (row, _), mine in zip(asking, places, strict=True)])
    top = max(row.block.logprobs.ids.shape[1] for row, _ in asking)
    found, first = logprobs(logits.rows(index), tokens, top), 0
    for (row, _), mine in zip(asking, places, strict=True):
        row.block.logprobs[mine] = found[first : first + len(mine)]
        first += len(mine)


class _Batch:
    """Rows as tensors. Grids are (rows, width), the width of the longest block."""

    def __init__(self, rows: list[tuple[Sequence, Row]], logits: Logits):
        self.rows, self.logits = rows, logits
        self.sequences = [sequence for sequence, _ in rows]
        self.blocks = [row.block for _, row in rows]
        self.configs = [s.request.config for s in self.sequences]
        self.mask_id = self.sequences[0].mask_id
        self.width = max(len(b.tokens) for b in self.blocks)
        where = self.grid([row.logits for _, row in rows], -1)
        self.line, self.column = (where >= 0).nonzero()
        self.index = where[self.line, self.column]
        self._line = torch.from_numpy(self.line)
        self._flat = torch.from_numpy(self.line * self.width + self.column)
        self.failures: list[tuple[Sequence, T3DError]] = []
        self.memories: dict[type[Policy], dict[str, Tensor]] = {}

    def grid(self, arrays: list[np.ndarray], fill) -> np.ndarray:
        """The rows' arrays (block,) as (rows, width)."""
        if all(len(a) == self.width for a in arrays):
            return np.stack(arrays)
        out = np.full((len(arrays), self.width), fill, dtype=arrays[0].dtype)
        for line, array in enumerate(arrays):
            out[line, : len(array)] = array
        return out

    def per_place(self, values, dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype)[self._line]

    def scatter(self, values: Tensor, fill) -> Tensor:
        out = torch.full((len(self.rows) * self.width,), fill, dtype=values.dtype)
        return out.index_copy_(0, self._flat, values).view(len(self.rows), self.width)

    def view(self) -> View:
        configs, needs = self.configs, frozenset().union(*(s.policy.needs for s in self.sequences))
        tokens = self.grid([b.tokens for b in self.blocks], 0)
        fixed = self.grid([b.fixed for b in self.blocks], True)
        masked = self.grid([s.window(b) for s, b in zip(self.sequences, self.blocks, strict=True)], False)
        open_ = torch.from_numpy(masked[self.line, self.column])  # of the places that were asked
        values = self._adjusted(self.logits.rows(self.index), open_)
        seed = self.per_place([s.request.seed for s in self.sequences], torch.int64)
        step = self.per_place([b.step for b in self.blocks], torch.int64)
        position = self.per_place([b.start for b in self.blocks], torch.int64) + torch.from_numpy(self.column)
        temperature = self.per_place([c.temperature for c in configs], torch.float32)
        if FILLED in needs:
            temperature = temperature.where(open_, 0.0)
        zeros = torch.zeros(len(self.index))  # hashing is dear beside a small model's forward, so only where used
        drawn = sample(
            values,
            temperature,
            self.per_place([c.top_k for c in configs], torch.int64),
            self.per_place([c.top_p for c in configs], torch.float32),
            uniform(seed, position, step, 0) if any(c.temperature > 0 for c in configs) else zeros,
            self.per_place([c.confidence == "sampling" for c in configs], torch.bool),
            entropy=ENTROPY in needs,
            margin=MARGIN in needs,
        )
        one_copy = torch.stack([x.double() for x in drawn if x is not None]).cpu()  # the step's only wait
        token, confidence = one_copy[0].long(), one_copy[1].float()
        self._find_failures(confidence, position)
        masked_tensor = torch.from_numpy(masked)
        quota = [min(b.quota(), n) for b, n in zip(self.blocks, masked.sum(1).tolist(), strict=True)]
        inside = confidence.where(open_, -torch.inf)
        view = View(
            tokens=torch.from_numpy(tokens),
            fixed=torch.from_numpy(fixed),
            masked=masked_tensor,
            proposal=self.scatter(token, 0),
            confidence=self.scatter(inside, -torch.inf),
            quota=torch.tensor(quota),
            step=torch.tensor([b.step for b in self.blocks]),
            steps=torch.tensor([c.steps for c in configs]),
            depth=torch.tensor([row.depth for _, row in self.rows]),
            progress=torch.tensor([row.progress for _, row in self.rows], dtype=torch.float32),
            must=torch.tensor([row.must for _, row in self.rows]),
        )
        if ENTROPY in needs:
            view.entropy = self.scatter(one_copy[2].float().where(open_, torch.inf), torch.inf)
        if MARGIN in needs:
            view.margin = self.scatter(one_copy[-1].float().where(open_, -torch.inf), -torch.inf)
        if UNIFORM in needs:
            view.uniform = self.scatter(uniform(seed, position, step, 1), 0.0)
        if FILLED in needs:
            view.expected = view.proposal
            filled = torch.from_numpy(tokens[self.line, self.column] != self.mask_id)
            view.certainty = self.scatter(confidence.where(filled, -torch.inf), -torch.inf)
        if SHADOW in needs:
            view.shadow = self._shadow(tokens)
        if STOP in needs:
            stops = [torch.tensor(c.stop_ids, dtype=torch.int64) for c in configs]
            ends = [torch.isin(p, s) for p, s in zip(view.proposal, stops, strict=True)]
            view.stop = torch.stack(ends) & view.masked
        return view

    def _adjusted(self, values: Tensor, open_: Tensor) -> Tensor:
        """The logits, where a policy changes them: at masked places, and in a copy."""
        kinds = {type(s.policy) for s in self.sequences}
        changing = [kind for kind in kinds if kind.adjust.__func__ is not Policy.adjust.__func__]
        for kind in changing:
            mine = [n for n, s in enumerate(self.sequences) if type(s.policy) is kind]
            memory = self.memory(kind, mine)
            local = torch.full((len(self.rows),), -1)
            local[mine] = torch.arange(len(mine))
            at = ((local[self._line] >= 0) & open_).nonzero()[:, 0]
            if not len(at):
                continue
            line, column = local[self._line[at]], torch.from_numpy(self.column)[at]
            device = values.device
            cut = {
                name: (memory[name][line] if m.shape == "row" else memory[name][line, column]).to(device)
                for name, m in kind.memory.items()
            }
            knobs = self.knobs(kind, mine).rows(line, device)
            values = values.clone() if values is self.logits.values else values
            values[at.to(device)] = kind.adjust(values[at.to(device)], knobs, cut)
            for name, m in kind.memory.items():
                if m.shape != "row":
                    memory[name][line, column] = cut[name].to(memory[name].device)
        return values

    def _shadow(self, tokens: np.ndarray) -> Tensor:
        where = self.grid([r.logits * 0 - 1 if r.shadow is None else r.shadow for _, r in self.rows], -1)
        line, column = (where >= 0).nonzero()
        out = torch.full(where.shape, torch.inf)
        if len(line):
            values = self.logits.rows(where[line, column])
            mine = torch.from_numpy(tokens[line, column]).to(values.device)
            p = values.softmax(-1).gather(1, mine[:, None])[:, 0].cpu()
            out[torch.from_numpy(line), torch.from_numpy(column)] = p
        return out

    def _find_failures(self, confidence: Tensor, position: Tensor) -> None:
        found: dict[int, tuple[Sequence, T3DError]] = {}
        for place in confidence.isnan().nonzero()[:, 0].tolist():
            number = int(self.line[place])
            sequence = self.sequences[number]
            error = sequence.request.not_numbers(int(position[place]), self.blocks[number].step)
            found.setdefault(id(sequence), (sequence, error))
        self.failures = list(found.values())

    def knobs(self, kind: type[Policy], mine: list[int]) -> Knobs:
        return Knobs([self.sequences[n].policy for n in mine])

    def revisions(self, mine: list[int]) -> Tensor:
        return torch.from_numpy(self.grid([self.blocks[n].revisions for n in mine], 0))

    def memory(self, kind: type[Policy], mine: list[int]) -> dict[str, Tensor]:
        """What these rows' blocks remember, stacked once; made where a block is new."""
        if kind in self.memories:
            return self.memories[kind]
        found = self.memories[kind] = {}
        for name, m in kind.memory.items():
            device = self.logits.values.device if m.shape == "vocabulary" else "cpu"
            for n in mine:
                if name not in self.blocks[n].memory:
                    vocabulary = self.logits.values.shape[1]
                    self.blocks[n].memory[name] = m.new(len(self.blocks[n].tokens), vocabulary, device)
            parts = [self.blocks[n].memory[name] for n in mine]
            if m.shape != "row" and any(len(p) < self.width for p in parts):
                parts = [torch.cat([p, m.new(self.width - len(p), p.shape[-1], device)]) for p in parts]
            found[name] = torch.stack(parts)
        return found

    def keep(self, kind: type[Policy], mine: list[int], memory: dict[str, Tensor]) -> None:
        for name, m in kind.memory.items():
            for line, n in enumerate(mine):
                block = self.blocks[n]
                block.memory[name] = memory[name][line] if m.shape == "row" else memory[name][line, : len(block.tokens)]


def _apply(
    sequence: Sequence, row: Row, line: int, *, commit, rewrite, new, remask, proposal, confidence, certainty
) -> None:
    """Change the row's block as its line says of what `Lawful` lets be done and of what is drawn, all (rows, width)."""
    block = row.block
    size = len(block.tokens)
    changed = places = commit[line, :size].nonzero()[0]
    block.tokens[places] = proposal[line, places]
    block.confidence[places] = confidence[line, places]
    if rewrite is not None:
        places = rewrite[line, :size].nonzero()[0]
        block.tokens[places] = new[line, places]
        block.confidence[places] = certainty[line, places]
        block.revisions[places] += 1
        changed = np.concatenate([changed, places])
    if remask is not None:
        places = remask[line, :size].nonzero()[0]
        block.tokens[places] = block.mask_id
        block.confidence[places] = 0.0
        block.revisions[places] += 1
        changed = np.concatenate([changed, places])
    block.changed = len(changed) > 0
    if block.changed:
        sequence.record(block, changed, draft=row.draft)
