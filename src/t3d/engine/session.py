"""The loop of an engine, one forward at a time: requests can be added while others run."""

from dataclasses import dataclass

import torch

from t3d.decoding.flight import Row
from t3d.decoding.logprobs import Logprobs
from t3d.engine.decide import Logits, decide
from t3d.engine.guidance import Companion, guide
from t3d.engine.kv_cache import KVCache, cache_shape
from t3d.engine.request import Request, Sequence
from t3d.engine.runner import Runner
from t3d.engine.scheduler import Scheduler
from t3d.errors import T3DError
from t3d.trajectories.record import Trajectory


@dataclass(frozen=True)
class BlockEvent:
    """A block of one sequence is decided. `token_ids` are its generated tokens (a prompt's tail left out)."""

    index: int
    sample: int
    token_ids: list[int]
    step_map: list[int]
    logprobs: Logprobs | None = None  # if asked for


@dataclass(frozen=True)
class FinishedEvent:
    """A sequence has ended. `index` is its prompt's place in the caller's list."""

    index: int
    sample: int
    trajectory: Trajectory
    cached: int = 0  # prompt tokens that it did not compute, since their keys were in the cache


@dataclass(frozen=True)
class StepEvent:
    """One denoising step of a block of a watched sequence. Places count from the response's start; a token that is the
    mask's id was taken back. Those of one forward have the same `forward`, which counts from 1."""

    index: int
    sample: int
    step: int
    places: list[int]
    token_ids: list[int]
    confidence: list[float]
    forward: int


@dataclass(frozen=True)
class FailedEvent:
    """A sequence cannot go on: the model's logits are not numbers."""

    index: int
    sample: int
    error: T3DError


Event = StepEvent | BlockEvent | FinishedEvent | FailedEvent


@dataclass
class EngineStats:
    """What one call has done so far. Tokens count through the first stop token."""

    sequences: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0  # of finished sequences
    forwards: int = 0  # of the model, whatever the batch
    sequence_forwards: int = 0  # that predicted tokens, summed over the finished sequences
    cached_tokens: int = 0  # of prompts, not computed since their keys were in the cache
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
            self.failed += isinstance(event, FailedEvent)
            if isinstance(event, FinishedEvent):
                self.finished += 1
                self.tokens += event.trajectory.length
                self.sequence_forwards += event.trajectory.nfe.predicting


class Session:
    """A cache of `pages` pages and a scheduler over one model. `add` requests, then `step` until `done`.

    Requests may be added and cancelled between steps, by the thread that steps.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer,
        size: tuple[int, int],
        scheduling: dict,
        stats: EngineStats,
        prefix_cache: bool = False,
    ):
        self.runner, self.tokenizer, self.stats = runner, tokenizer, stats
        self.mask_id = runner.model.config.mask_token_id
        pages, page_size = size
        stats.kv_budget_tokens = pages * page_size
        shape = cache_shape(runner.model.config)
        self.cache = KVCache(pages, page_size, *shape, runner.dtype, runner.device, keep=prefix_cache)
        self.scheduler = Scheduler(self.cache, **scheduling, shift=runner.shift)

    def add(self, request: Request, watch: bool = False) -> None:
        """`watch`: every denoising step gives a StepEvent. Raises T3DError if the cache can never hold the request."""
        check_fits(request, self.cache.num_pages, self.cache.page_size)
        weights = self.runner.version() if self.cache.keep else 0
        sequence = Sequence(request, self.mask_id, watch, weights=weights)
        if request.guided:
            sequence.sides = (sequence, Companion(sequence))
        self.scheduler.add(sequence)

    def cancel(self, index: int) -> None:
        """Drop all samples of the request, running or waiting; their pages are free at once and no event follows."""
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.request.index == index:
                self.scheduler.remove(sequence)
                self.stats.cancelled += 1
        self._gauge()

    @property
    def done(self) -> bool:
        return not (self.scheduler.running or self.scheduler.waiting)

    @torch.inference_mode()
    def step(self, isolate: bool = False) -> list[Event]:
        """One forward of the model, and what follows from it.

        Where a sequence's logits are not numbers, raises T3DError; with `isolate` the sequence is dropped with a
        FailedEvent instead, and the others go on.
        """
        queries, companions = self.scheduler.plan()
        values = self.runner.forward(self.cache, queries + companions)
        denoising = []
        for query in queries:
            hit = query.sequence.hit
            query.sequence.advance(query)
            self.stats.cached_tokens += query.sequence.hit - hit
            if query.denoise:
                denoising.append(query.sequence)
        for query in companions:
            query.sequence.advance(query)
        self.cache.wrote(queries + companions)
        if companions:
            values = guide(values, queries, companions)
        logits = Logits(values, self.mask_id)
        events: list[Event] = []
        going, answer, failures = denoising, logits, []
        while going:
            rows: list[tuple[Sequence, Row]] = []
            for sequence in going:
                try:
                    asked = sequence.turns.send(answer)
                except StopIteration:  # all that can count is final
                    continue
                except T3DError as error:
                    failures.append((sequence, error))
                    continue
                if isinstance(asked[0], Row):
                    rows += [(sequence, row) for row in asked]
                else:
                    sequence.asked = asked
            failures += decide(rows, logits) if rows else []
            if failures and not isolate:
                raise failures[0][1]
            events += [self._fail(sequence, error) for sequence, error in failures]
            failed = {id(sequence) for sequence, _ in failures}
            going = [s for s in dict.fromkeys(sequence for sequence, _ in rows) if id(s) not in failed]
            answer, failures = None, []
        for sequence in denoising:
            if sequence.told:
                about = (sequence.request.index, sequence.request.sample)
                events += [StepEvent(*about, *told, sequence.denoise + sequence.verify) for told in sequence.told]
                sequence.told.clear()
        for sequence in denoising:
            if sequence.finished and not sequence.failed:
                events += self._end_blocks(sequence)
        self._count(events)
        return events

    def _fail(self, sequence: Sequence, error: T3DError) -> FailedEvent:
        sequence.failed = True
        self.scheduler.remove(sequence)
        return FailedEvent(sequence.request.index, sequence.request.sample, error)

    def _end_blocks(self, sequence: Sequence) -> list[Event]:
        """Tell of the blocks that have become final, up to one that ends the sequence."""
        request, prompt = sequence.request, sequence.request.start
        events: list[Event] = []
        blocks, sequence.finished = sequence.finished, []
        for block in blocks:
            first = max(block.start, prompt)
            tokens, steps = (x[first : block.end].tolist() for x in (sequence.tokens, sequence.step_map))
            noted = None if sequence.logprobs is None else sequence.logprobs[first : block.end]
            events.append(BlockEvent(request.index, request.sample, tokens, steps, noted))
            end = sequence.end(first, block.end, self.tokenizer)
            if end is None:
                continue
            sequence.ended = True
            self.scheduler.remove(sequence)
            length, reason = end
            text = None
            if self.tokenizer is not None:
                text = self.tokenizer.decode(sequence.tokens[prompt : prompt + length], skip_special_tokens=True)
            trajectory = sequence.trajectory(block.end, length, reason, text)
            return [*events, FinishedEvent(request.index, request.sample, trajectory, sequence.hit)]
        return events

    def _count(self, events: list[Event]) -> None:
        self.stats.count(events)
        self.stats.forwards += 1
        self._gauge()

    def _gauge(self) -> None:
        stats, cache = self.stats, self.cache
        stats.running, stats.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        stats.preemptions = self.scheduler.preemptions
        stats.kv_tokens = cache.used_pages * cache.page_size
        stats.kv_peak_tokens = cache.peak * cache.page_size


def pages_for(request: Request, page_size: int) -> int:
    """The most pages that it can come to need."""
    return sum(-(-places // page_size) for places in request.most_each)


def check_fits(request: Request, pages: int, page_size: int) -> None:
    """Raises T3DError if a cache of this size can never hold the request."""
    if pages_for(request, page_size) > pages:
        most = f"{sum(request.most_each)} positions" + (" with guidance" if request.guided else "")
        raise T3DError(
            f"{request} can come to {most}, but the cache holds {pages * page_size} "
            f"({pages} pages of {page_size}); raise engine.kv_cache_tokens, or lower max_tokens or the blocks in flight"
        )
