"""Many prompts in, trajectories out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from t3d.decoding.config import DecodingConfig
from t3d.decoding.sampling import derive_seed, sample, uniform
from t3d.decoding.strategies import STRATEGIES, Candidates, commit_mask, step_quota
from t3d.engine.kv_cache import KVCache
from t3d.engine.request import Request, Sequence, Span
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


@dataclass(frozen=True)
class FinishedEvent:
    """A sequence has ended. `index` is its prompt's place in the caller's list."""

    index: int
    sample: int
    trajectory: Trajectory


class Engine:
    """Decodes prompts with a block-diffusion model: batched, with a KV cache, reproducible per sequence.

    model: a transformers Qwen3-like model with `config.block_size` and `config.mask_token_id`; its weights are read
    anew at every call. tokenizer: needed for prompts as strings, stop strings and `Trajectory.text`.
    max_batch_size: sequences in flight. kv_cache_tokens: budget of the cache in token positions; None is what the call
    needs at most, within half of the free memory. page_size: positions per cache page; None chooses. prefill_tokens:
    most prompt tokens one forward carries besides the blocks being denoised. fused: write a finished block's keys and
    values in the forward of the next block's first step (False: in one of its own, as a plain sampler does).
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
    ):
        for name, value in (("max_batch_size", max_batch_size), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise T3DError(f"engine.{name} must be at least 1, got {value}")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.kv_cache_tokens, self.page_size = max_batch_size, kv_cache_tokens, page_size
        self.prefill_tokens, self.fused = prefill_tokens, fused
        self.mask_id = getattr(model.config, "mask_token_id", None)
        if self.mask_id is None:
            raise T3DError("the model's config has no mask_token_id; it is not a block-diffusion checkpoint")
        self.runner: Runner | None = None
        self.scheduler: Scheduler | None = None
        self._cache: KVCache | None = None

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
        empty, contains the mask token, or cannot fit the model's context or the cache.
        """
        requests = self._requests(prompts, config, seeds)
        results: dict[tuple[int, int], Trajectory] = {}
        for event in self._run(requests):
            if isinstance(event, FinishedEvent):
                results[event.index, event.sample] = event.trajectory
        return [results[r.index, r.sample] for r in requests]

    def stream(
        self,
        prompts: list[str] | list[list[int]],
        config: DecodingConfig | list[DecodingConfig] | None = None,
        *,
        seeds: list[int] | None = None,
    ) -> Iterator[BlockEvent | FinishedEvent]:
        """As `generate`, but yields each block as it is decided and each trajectory as it ends."""
        return self._run(self._requests(prompts, config, seeds))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _requests(self, prompts, config, seeds) -> list[Request]:
        configs = config if isinstance(config, list) else [config or DecodingConfig()] * len(prompts)
        if len(configs) != len(prompts):
            raise T3DError(f"{len(prompts)} prompts but {len(configs)} decoding configs; give one, or one per prompt")
        if seeds is not None and len(seeds) != len(prompts):
            raise T3DError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one per prompt")
        requests = []
        for index, (prompt, settings) in enumerate(zip(prompts, configs, strict=True)):
            ids = tuple(self._encode(prompt, index))
            settings = self._resolve(settings)
            for number in range(settings.n):
                if seeds is None:
                    seed = derive_seed(settings.seed, index, number)
                else:
                    seed = seeds[index] if number == 0 else derive_seed(seeds[index], number)
                requests.append(Request(index, number, ids, settings, seed))
            self._check(requests[-1])
        return requests

    def _encode(self, prompt, index: int) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise T3DError(f"prompt {index} is a string, but the engine has no tokenizer; give token ids")
        return self.tokenizer.encode(prompt, add_special_tokens=False)

    def _resolve(self, config: DecodingConfig) -> DecodingConfig:
        from t3d.models import stop_ids

        block = config.block_size or getattr(self.model.config, "block_size", None)
        if block is None:
            raise T3DError("the model's config has no block_size; set it in the decoding settings")
        steps = config.steps or block
        if steps > block:
            raise T3DError(f"steps = {steps} is more than block_size = {block}: a step commits at least one token")
        if config.stop and self.tokenizer is None:
            raise T3DError("stop strings need a tokenizer; use stop_ids")
        stops = config.stop_ids
        if stops is None:
            stops = () if config.ignore_eos else stop_ids(self.model)
        return replace(config, block_size=block, steps=steps, stop_ids=stops)

    def _check(self, request: Request) -> None:
        ids, name, limit = request.prompt_ids, f"prompt {request.index}", self.model.config.max_position_embeddings
        if not ids:
            raise T3DError(f"{name} is empty")
        if self.mask_id in ids:
            raise T3DError(f"{name} contains the mask token (id {self.mask_id}) at position {ids.index(self.mask_id)}")
        vocab = self.model.config.vocab_size
        if min(ids) < 0 or max(ids) >= vocab:
            raise T3DError(f"{name} has a token id outside 0..{vocab - 1}: is this the model's tokenizer?")
        if request.most_tokens > limit:
            raise T3DError(
                f"{name} has {len(ids)} tokens; with max_tokens = {request.config.max_tokens} that is "
                f"{request.most_tokens} positions, but the model's context is {limit}"
            )
        if self.kv_cache_tokens is not None and request.most_tokens > self.kv_cache_tokens:
            raise T3DError(
                f"{name} can come to {request.most_tokens} positions, but engine.kv_cache_tokens = "
                f"{self.kv_cache_tokens}; raise it or lower max_tokens"
            )

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _run(self, requests: list[Request]) -> Iterator[BlockEvent | FinishedEvent]:
        if not requests:
            return
        if self.runner is None:
            self.runner = Runner(self.model)
        else:
            self.runner.refresh()
        cache = self._make_cache(requests)
        scheduler = self.scheduler = Scheduler(cache, self.max_batch_size, self.prefill_tokens, self.fused)
        for request in requests:
            scheduler.add(Sequence(request, self.mask_id))
        training = self.model.training
        self.model.eval()
        try:
            while spans := scheduler.plan():
                yield from self._step(scheduler, spans)
        finally:
            self.model.train(training)

    def _make_cache(self, requests: list[Request]) -> KVCache:
        """Pages that hold a whole sequence where the budget allows it for all in flight; small pages otherwise."""
        longest = max(r.most_tokens for r in requests)
        need = longest * min(self.max_batch_size, len(requests))
        config, runner = self.model.config, self.runner
        per_token = 2 * config.num_hidden_layers * runner.kv_heads * runner.head_dim * runner.dtype.itemsize
        budget = self.kv_cache_tokens or min(need, _free_memory(runner.device) // 2 // per_token)
        if longest > budget:
            raise T3DError(f"a sequence can come to {longest} positions, but memory holds {budget}; lower max_tokens")
        page = self.page_size or (longest if need <= budget else min(64, budget))
        pages = min(budget, need + page * self.max_batch_size) // page
        if pages * page < longest:
            page, pages = budget, 1
        return KVCache(
            pages, page, config.num_hidden_layers, runner.kv_heads, runner.head_dim, runner.dtype, runner.device
        )

    @torch.inference_mode()
    def _step(self, scheduler: Scheduler, spans: list[Span]) -> list[BlockEvent | FinishedEvent]:
        """One forward, and what follows from it."""
        denoising = [s.sequence for s in spans if s.denoise]
        masked = {id(s): s.masked() for s in denoising}

        def wanted(span: Span) -> np.ndarray:
            if not span.denoise:
                return np.zeros(0, dtype=np.int64)
            return span.sequence.base + masked[id(span.sequence)].nonzero()[0]

        logits = self.runner.forward(scheduler.cache, spans, wanted)
        for span in spans:
            span.sequence.advance(span)
        if denoising:
            self._commit(denoising, [masked[id(s)] for s in denoising], logits)
        events: list[BlockEvent | FinishedEvent] = []
        for sequence in denoising:
            if not sequence.masked().any():
                events += self._end_block(scheduler, sequence)
        return events

    def _commit(self, sequences: list[Sequence], masks: list[np.ndarray], logits: torch.Tensor) -> None:
        """Sample every masked position and commit those the strategy chooses. logits: (masked positions, vocab)"""
        configs = [s.request.config for s in sequences]
        counts = np.array([m.sum() for m in masks])
        width = max(len(m) for m in masks)
        masked = np.zeros((len(masks), width), dtype=bool)
        for row, mask in enumerate(masks):
            masked[row, : len(mask)] = mask
        rows, columns = masked.nonzero()
        flat = torch.from_numpy(rows * width + columns)

        def per_position(values, dtype):
            return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), counts))

        seed = per_position([s.request.seed for s in sequences], np.int64)
        position = torch.from_numpy(np.array([s.base for s in sequences])[rows] + columns)
        step = per_position([s.step for s in sequences], np.int64)
        kinds = [STRATEGIES[c.strategy] for c in configs]
        logits[:, self.mask_id] = -torch.inf
        tokens, confidence, entropy = sample(
            logits,
            per_position([c.temperature for c in configs], np.float32),
            per_position([c.top_k for c in configs], np.int64),
            per_position([c.top_p for c in configs], np.float32),
            uniform(seed, position, step),
            per_position([c.confidence == "sampling" for c in configs], bool),
            entropy=any(k.needs_entropy for k in kinds),
        )
        if self.runner.device.type != "cpu":
            tokens, confidence = tokens.cpu(), confidence.cpu()
            entropy = None if entropy is None else entropy.cpu()
        bad = confidence.isnan()
        if bad.any():
            first = int(bad.nonzero()[0, 0])
            sequence = sequences[rows[first]]
            raise T3DError(
                f"{sequence.request}: the model gave NaN at position {int(position[first])}, step {sequence.step}; "
                "its weights or its dtype overflow"
            )

        def grid(values: torch.Tensor, fill: float) -> torch.Tensor:
            out = torch.full((len(masks) * width,), fill, dtype=values.dtype)
            return out.index_copy_(0, flat, values).view(len(masks), width)

        confidence = grid(confidence, -torch.inf)
        entropy = None if entropy is None else grid(entropy, torch.inf)
        u = grid(uniform(seed, position, step, stream=1), 1.0)
        quota = [
            min(step_quota(c.block_size, c.steps, s.step), int(n))
            for s, c, n in zip(sequences, configs, counts, strict=True)
        ]
        floor = [q if c.floor == "schedule" else 1 for q, c in zip(quota, configs, strict=True)]
        threshold = [c.threshold for c in configs]
        chosen = np.zeros((len(masks), width), dtype=bool)
        for kind in set(kinds):
            mine = [row for row, k in enumerate(kinds) if k is kind]
            candidates = Candidates(
                masked=torch.from_numpy(masked[mine]),
                confidence=confidence[mine],
                entropy=None if entropy is None else entropy[mine],
                u=u[mine],
                quota=torch.tensor([quota[row] for row in mine]),
                floor=torch.tensor([floor[row] for row in mine]),
                threshold=torch.tensor([threshold[row] for row in mine], dtype=torch.float32),
            )
            chosen[mine] = commit_mask(kind, candidates).numpy()
        tokens, confidence = grid(tokens, 0).numpy(), confidence.numpy()
        for row, sequence in enumerate(sequences):
            place = chosen[row].nonzero()[0]
            sequence.tokens[sequence.base + place] = tokens[row, place]
            sequence.step_map[sequence.base + place] = sequence.step
            sequence.confidence[sequence.base + place] = confidence[row, place]
            sequence.step += 1

    def _end_block(self, scheduler: Scheduler, sequence: Sequence) -> Iterator[BlockEvent | FinishedEvent]:
        request = sequence.request
        first = max(sequence.base, len(request.prompt_ids))
        sequence.base, sequence.step = sequence.block_end, 0
        yield BlockEvent(
            request.index,
            request.sample,
            sequence.tokens[first : sequence.base].tolist(),
            sequence.step_map[first : sequence.base].tolist(),
        )
        end = self._end(sequence, first)
        if end is not None:
            scheduler.finish(sequence)
            length, reason = end
            text = None
            if self.tokenizer is not None:
                start = len(request.prompt_ids)
                text = self.tokenizer.decode(sequence.tokens[start : start + length], skip_special_tokens=True)
            yield FinishedEvent(request.index, request.sample, sequence.trajectory(length, reason, text))

    def _end(self, sequence: Sequence, first: int) -> tuple[int, str] | None:
        """(length, finish reason) if the sequence ends with the block of new tokens `first .. base`."""
        request = sequence.request
        start, most = len(request.prompt_ids), request.config.max_tokens
        for place in range(first, sequence.base):
            if place - start < most and sequence.tokens[place] in request.config.stop_ids:
                return place - start + 1, "stop"
        return (most, "length") if sequence.base - start >= most else None


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return sizes["MemAvailable"] * 1024
