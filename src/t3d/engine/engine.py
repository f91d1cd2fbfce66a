"""Many prompts in, trajectories out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from t3d.decoding.config import DecodingConfig
from t3d.engine.commit import commit_step
from t3d.engine.intake import make_requests
from t3d.engine.kv_cache import KVCache, cache_shape, free_memory
from t3d.engine.progress import Progress
from t3d.engine.request import Request, Sequence, Span
from t3d.engine.runner import ATTENTION, Runner
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


class Engine:
    """Decodes prompts with a block-diffusion model: batched, with a KV cache, reproducible per sequence.

    model: a transformers Qwen3-like model with `config.block_size` and `config.mask_token_id`; its weights are read
    anew at every call. tokenizer: needed for prompts as strings, stop strings and `Trajectory.text`.
    max_batch_size: sequences in flight. kv_cache_tokens: budget of the cache in token positions; None is what the call
    needs at most, within half of the free memory. page_size: positions per cache page; None chooses. prefill_tokens:
    most prompt tokens one forward carries besides the blocks being denoised. fused: write a finished block's keys and
    values in the forward of the next block's first step (False: in one of its own, as a plain sampler does). attention:
    "sdpa" (portable) or "flex" (FlexAttention; for GPUs).
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        max_batch_size: int = 64,
        kv_cache_tokens: int | None = None,
        page_size: int | None = None,
        prefill_tokens: int = 1024,
        fused: bool = True,
        attention: str = "sdpa",
    ):
        given = {
            "max_batch_size": max_batch_size,
            "kv_cache_tokens": kv_cache_tokens,
            "page_size": page_size,
            "prefill_tokens": prefill_tokens,
        }
        for name, value in given.items():
            if value is not None and value < 1:
                raise T3DError(f"engine.{name} must be at least 1, got {value}")
        if attention not in ATTENTION:
            raise T3DError(f"engine.attention is one of {', '.join(ATTENTION)}, got {attention!r}")
        if getattr(model.config, "mask_token_id", None) is None:
            raise T3DError("the model's config has no mask_token_id; it is not a block-diffusion checkpoint")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.kv_cache_tokens, self.page_size = max_batch_size, kv_cache_tokens, page_size
        self.prefill_tokens, self.fused, self.attention = prefill_tokens, fused, attention
        self.runner: Runner | None = None
        self.stats = EngineStats()

    def generate(
        self,
        prompts: list[str] | list[list[int]],
        config: DecodingConfig | list[DecodingConfig] | None = None,
        *,
        seeds: list[int] | None = None,
        progress: bool = False,
    ) -> list[Trajectory]:
        """Decode every prompt; trajectories in the order of the prompts (`config.n` consecutive ones each).

        A sequence's tokens depend on its prompt, its settings, its seed and the weights only. `seeds` gives one per
        prompt; by default they come from `config.seed` and the prompt's index. Raises T3DError for a prompt that is
        empty, contains the mask token, or cannot fit the model's context or the cache, and when logits are NaN.
        """
        results: dict[tuple[int, int], Trajectory] = {}
        for event in self.stream(prompts, config, seeds=seeds, progress=progress):
            if isinstance(event, FinishedEvent):
                results[event.index, event.sample] = event.trajectory
        return [results[key] for key in sorted(results)]

    def stream(
        self,
        prompts: list[str] | list[list[int]],
        config: DecodingConfig | list[DecodingConfig] | None = None,
        *,
        seeds: list[int] | None = None,
        progress: bool = False,
    ) -> Iterator[Event]:
        """As `generate`, but yields each block as it is decided and each trajectory as it ends, in that order.

        What a caller has stored when it is interrupted is whole trajectories; the rest was never handed out.
        """
        requests = make_requests(prompts, config, seeds, self.model, self.tokenizer)
        size = self._cache_size(requests) if requests else None
        return self._run(requests, size, progress)

    def _run(self, requests: list[Request], size: tuple[int, int] | None, progress: bool) -> Iterator[Event]:
        self.stats = EngineStats(sequences=len(requests))
        if size is None:
            return
        pages, page_size = size
        self.stats.kv_budget_tokens = pages * page_size
        if self.runner is None:
            self.runner = Runner(self.model, self.attention)
        else:
            self.runner.refresh()
        shape = cache_shape(self.model.config)
        cache = KVCache(pages, page_size, *shape, self.runner.dtype, self.runner.device)
        scheduler = Scheduler(cache, self.max_batch_size, self.prefill_tokens, self.fused)
        for request in requests:
            scheduler.add(Sequence(request, self.model.config.mask_token_id))
        training = self.model.training
        self.model.eval()
        try:
            with Progress(self.stats, enabled=progress) as bar:
                while spans := scheduler.plan():
                    events = self._step(scheduler, spans)
                    self._count(scheduler, events)
                    bar.update()
                    yield from events
        finally:
            self.model.train(training)

    def _cache_size(self, requests: list[Request]) -> tuple[int, int]:
        """(pages, positions per page): one page per sequence where the budget holds all in flight at their longest.

        Otherwise small pages, so that memory goes where the tokens are.
        """
        longest, rows = max(r.most_tokens for r in requests), min(self.max_batch_size, len(requests))
        budget = self.kv_cache_tokens or free_memory(self.model.device) // 2 // self._bytes_per_token()
        size = self.page_size or ATTENTION[self.attention].page_size
        if size is None and longest * rows <= budget:
            size = longest
        elif size is None:  # small, and leaving no more of the budget unused than the longest request allows
            size = next((n for n in (64, 32, 16, 8, 4, 2) if budget // n * n >= longest), 1)
        pages = min(budget // size, -(-longest // size) * rows)
        for request in requests:
            if request.most_tokens > pages * size:
                raise T3DError(
                    f"{request} can come to {request.most_tokens} positions, but the cache holds {pages * size} "
                    f"({pages} pages of {size}); raise engine.kv_cache_tokens or lower max_tokens"
                )
        return pages, size

    def _bytes_per_token(self) -> int:
        layers, heads, dim = cache_shape(self.model.config)
        return 2 * layers * heads * dim * self.model.dtype.itemsize

    @torch.inference_mode()
    def _step(self, scheduler: Scheduler, spans: list[Span]) -> list[Event]:
        """One forward, and what follows from it."""
        denoising = [s.sequence for s in spans if s.denoise]
        masks = {id(s): s.masked() for s in denoising}

        def wanted(span: Span) -> np.ndarray:
            """Positions whose logits are needed: the masked ones of the block in flight."""
            return span.sequence.base + masks[id(span.sequence)].nonzero()[0] if span.denoise else _NOTHING

        logits = self.runner.forward(scheduler.cache, spans, wanted)
        for span in spans:
            span.sequence.advance(span)
        if denoising:
            commit_step(denoising, list(masks.values()), logits, self.model.config.mask_token_id)
        events: list[Event] = []
        for sequence in denoising:
            if not sequence.masked().any():
                events += self._end_block(scheduler, sequence)
        return events

    def _end_block(self, scheduler: Scheduler, sequence: Sequence) -> Iterator[Event]:
        request, prompt = sequence.request, len(sequence.request.prompt_ids)
        first = max(sequence.base, prompt)
        sequence.base, sequence.step = sequence.block_end, 0
        block = slice(first, sequence.base)
        yield BlockEvent(
            request.index, request.sample, sequence.tokens[block].tolist(), sequence.step_map[block].tolist()
        )
        end = sequence.end(first, self.tokenizer)
        if end is None:
            return
        scheduler.finish(sequence)
        length, reason = end
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(sequence.tokens[prompt : prompt + length], skip_special_tokens=True)
        yield FinishedEvent(request.index, request.sample, sequence.trajectory(length, reason, text))

    def _count(self, scheduler: Scheduler, events: list[Event]) -> None:
        stats, cache = self.stats, scheduler.cache
        for event in events:
            if isinstance(event, FinishedEvent):
                stats.finished += 1
                stats.tokens += event.trajectory.length
                stats.sequence_forwards += event.trajectory.nfe.total
        stats.forwards += 1
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        stats.preemptions = scheduler.preemptions
        stats.kv_tokens = cache.used_pages * cache.page_size
        stats.kv_peak_tokens = cache.peak * cache.page_size


_NOTHING = np.zeros(0, dtype=np.int64)
