"""The loop of an engine, one forward at a time: requests can be added while others run."""

from dataclasses import dataclass

import numpy as np
import torch

from t3d.engine.commit import commit_step
from t3d.engine.kv_cache import KVCache, cache_shape
from t3d.engine.request import Request, Sequence, Span
from t3d.engine.runner import Runner
from t3d.engine.scheduler import Scheduler
from t3d.trajectories.record import Trajectory

_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class BlockEvent:
    """A block of one sequence is decided. `token_ids` are its generated tokens (a prompt's tail left out)."""

    index: int
    sample: int
    token_ids: list[int]
    step_map: list[int]


@dataclass(frozen=True)
class FinishedEvent:
    """A sequence has ended. `index` is its prompt's place in the caller's list."""

    index: int
    sample: int
    trajectory: Trajectory


Event = BlockEvent | FinishedEvent


@dataclass
class EngineStats:
    """What one call has done so far. Tokens count through the first stop token."""

    sequences: int = 0
    finished: int = 0
    tokens: int = 0  # of finished sequences
    forwards: int = 0  # of the model, whatever the batch
    sequence_forwards: int = 0  # summed over the finished sequences: their NFE
    preemptions: int = 0
    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0  # positions that the pages in use can hold
    kv_peak_tokens: int = 0
    kv_budget_tokens: int = 0

    def line(self, seconds: float) -> str:
        """For a progress bar: tokens/s, tokens per forward, who runs and who waits, and how full the cache is."""
        rate, per_forward = self.tokens / max(seconds, 1e-9), self.tokens / max(self.sequence_forwards, 1)
        use = self.kv_tokens / max(self.kv_budget_tokens, 1)
        running = f"running {self.running}  waiting {self.waiting}"
        return f"{rate:,.0f} tok/s  TPF {per_forward:.2f}  {running}  KV {use:.0%}"

    def count(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, FinishedEvent):
                self.finished += 1
                self.tokens += event.trajectory.length
                self.sequence_forwards += event.trajectory.nfe.total


class Session:
    """A cache of `pages` pages and a scheduler over one model. `add` requests, then `step` until `done`."""

    def __init__(self, runner: Runner, tokenizer, size: tuple[int, int], scheduling: dict, stats: EngineStats):
        self.runner, self.tokenizer, self.stats = runner, tokenizer, stats
        self.mask_id = runner.model.config.mask_token_id
        pages, page_size = size
        stats.kv_budget_tokens = pages * page_size
        self.cache = KVCache(pages, page_size, *cache_shape(runner.model.config), runner.dtype, runner.device)
        self.scheduler = Scheduler(self.cache, **scheduling)

    def add(self, request: Request) -> None:
        self.scheduler.add(Sequence(request, self.mask_id))

    @property
    def done(self) -> bool:
        return not (self.scheduler.running or self.scheduler.waiting)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward of the model, and what follows from it."""
        spans = self.scheduler.plan()
        denoising = [s.sequence for s in spans if s.denoise]
        masks = {id(s): s.masked() for s in denoising}

        def wanted(span: Span) -> np.ndarray:
            """Positions whose logits are needed: the masked ones of the block in flight."""
            return span.sequence.base + masks[id(span.sequence)].nonzero()[0] if span.denoise else _NOTHING

        logits = self.runner.forward(self.cache, spans, wanted)
        for span in spans:
            span.sequence.advance(span)
        if denoising:
            commit_step(denoising, list(masks.values()), logits, self.mask_id)
        events: list[Event] = []
        for sequence in denoising:
            if not sequence.masked().any():
                events += self._end_block(sequence)
        self._count(events)
        return events

    def _end_block(self, sequence: Sequence) -> list[Event]:
        request, prompt = sequence.request, len(sequence.request.prompt_ids)
        first = max(sequence.base, prompt)
        sequence.base, sequence.step = sequence.block_end, 0
        tokens, steps = (x[first : sequence.base].tolist() for x in (sequence.tokens, sequence.step_map))
        block = BlockEvent(request.index, request.sample, tokens, steps)
        end = sequence.end(first, self.tokenizer)
        if end is None:
            return [block]
        self.scheduler.finish(sequence)
        length, reason = end
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(sequence.tokens[prompt : prompt + length], skip_special_tokens=True)
        return [block, FinishedEvent(request.index, request.sample, sequence.trajectory(length, reason, text))]

    def _count(self, events: list[Event]) -> None:
        stats, cache = self.stats, self.cache
        stats.count(events)
        stats.forwards += 1
        stats.running, stats.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        stats.preemptions = self.scheduler.preemptions
        stats.kv_tokens = cache.used_pages * cache.page_size
        stats.kv_peak_tokens = cache.peak * cache.page_size
