"""Many prompts in, trajectories out."""

from collections import deque
from collections.abc import Iterator

from t3d.decoding.config import DecodingConfig
from t3d.engine.intake import make_requests
from t3d.engine.kv_cache import bytes_per_token, free_memory
from t3d.engine.progress import Bar
from t3d.engine.request import Request
from t3d.engine.runner import ATTENTION, Runner
from t3d.engine.session import EngineStats, Event, FinishedEvent, Session, check_fits
from t3d.errors import T3DError
from t3d.trajectories.record import Trajectory

_LITTLE = 256 << 20  # bytes of cache that are not worth paging


class Engine:
    """Decodes prompts with a block-diffusion model: batched, with a KV cache, reproducible per sequence.

    Args:
        model: a model of a family (`t3d.models`), with `config.block_size` and `config.mask_token_id`; its weights are
            read anew at every call.
        tokenizer: needed for prompts as strings, stop strings and `Trajectory.text`.
        max_batch_size: sequences in flight.
        kv_cache_tokens: budget of the cache in token positions; None: what the call needs at most, within the share
            `memory_share` of the memory that is free when it begins.
        memory_share: see `kv_cache_tokens`.
        page_size: positions per page of the cache; None chooses.
        prefill_tokens: most prompt tokens that one forward carries besides the blocks being denoised.
        fused: write a finished block's keys and values in the forward of the next block's first step; False: in one of
            its own, as a plain sampler does.
        attention: "sdpa" (portable) or "flex" (FlexAttention; for GPUs).
        cuda_graphs: replay the forwards of steady decoding, with "flex" only; None: on a GPU.
        prefix_cache: within a call, prompts and answers that begin alike are computed once and kept while there is
            room.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        max_batch_size: int = 64,
        kv_cache_tokens: int | None = None,
        memory_share: float = 0.5,
        page_size: int | None = None,
        prefill_tokens: int = 1024,
        fused: bool = True,
        attention: str = "sdpa",
        cuda_graphs: bool | None = None,
        prefix_cache: bool = False,
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
        if not 0 < memory_share <= 1:
            raise T3DError(f"engine.memory_share must lie in (0, 1], got {memory_share}")
        if attention not in ATTENTION:
            raise T3DError(f"engine.attention is one of {', '.join(ATTENTION)}, got {attention!r}")
        if cuda_graphs and attention != "flex":
            raise T3DError("engine.cuda_graphs needs engine.attention=flex")
        if getattr(model.config, "mask_token_id", None) is None:
            raise T3DError("the model's config has no mask_token_id; it is not a block-diffusion checkpoint")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.kv_cache_tokens, self.page_size = max_batch_size, kv_cache_tokens, page_size
        self.memory_share, self.prefix_cache = memory_share, prefix_cache
        self.prefill_tokens, self.fused, self.attention = prefill_tokens, fused, attention
        on_gpu = attention == "flex" and model.device.type == "cuda"
        self.cuda_graphs = on_gpu if cuda_graphs is None else cuda_graphs
        self.runner: Runner | None = None
        self.stats = EngineStats()

    def generate(
        self,
        prompts: list[str] | list[list[int]],
        config: DecodingConfig | list[DecodingConfig] | None = None,
        *,
        seeds: list[int] | None = None,
        names: list[str] | None = None,
        logprobs: int | None = None,
        progress: bool = False,
    ) -> list[Trajectory]:
        """Decode every prompt; trajectories in the order of the prompts (`config.n` consecutive ones each).

        A sequence's tokens depend on its prompt, its settings, its seed and the weights only.

        Args:
            prompts: texts or token ids.
            config: settings of all prompts, or one for each.
            seeds: one per prompt; by default they come from `config.seed` and the prompt's index.
            names: what messages call the prompts; by default their indices.
            logprobs: note each token's log-probability when it was committed, and this many alternatives'
                (`Trajectory.logprobs`); None: nothing.
            progress: show a bar.

        Raises:
            T3DError: if a prompt is empty, contains the mask token, or cannot fit the model's context or the cache, and
                when logits are NaN.
        """
        results: dict[tuple[int, int], Trajectory] = {}
        for event in self.stream(prompts, config, seeds=seeds, names=names, logprobs=logprobs, progress=progress):
            if isinstance(event, FinishedEvent):
                results[event.index, event.sample] = event.trajectory
        return [results[key] for key in sorted(results)]

    def stream(
        self,
        prompts: list[str] | list[list[int]],
        config: DecodingConfig | list[DecodingConfig] | None = None,
        *,
        seeds: list[int] | None = None,
        names: list[str] | None = None,
        logprobs: int | None = None,
        progress: bool = False,
    ) -> Iterator[Event]:
        """As `generate`, but yields each block as it is decided and each trajectory as it ends, in that order.

        The prompts are checked at the call, the work is done while iterating. What a caller has stored when it is
        interrupted is whole trajectories; the rest was never handed out.
        """
        requests = make_requests(prompts, config, seeds, names, self.model, self.tokenizer, logprobs)
        self.cache_size(requests)
        return self._run(requests, progress)

    def open(self, requests: list[Request] | None = None) -> Session:
        """A session whose cache is sized for these requests, none of which is added yet; reads the weights.

        Without requests, it is sized for whatever may come: a full batch as long as the model's context, within budget.
        """
        if self.runner is None:
            self.runner = Runner(self.model, self.attention, self.cuda_graphs)
        else:
            self.runner.refresh()
        self.stats = EngineStats()
        scheduling = {
            "max_batch_size": self.max_batch_size,
            "prefill_tokens": self.prefill_tokens,
            "fused": self.fused,
        }
        size = self.cache_size(requests)
        return Session(self.runner, self.tokenizer, size, scheduling, self.stats, self.prefix_cache)

    def _run(self, requests: list[Request], progress: bool) -> Iterator[Event]:
        session, waiting = self.open(requests), deque(requests)
        self.stats.sequences = len(requests)
        training = self.model.training
        self.model.eval()
        try:
            with Bar(total=len(requests), desc="decoding", unit="seq", disable=not progress) as bar:
                while waiting or not session.done:
                    while waiting and len(session.scheduler.waiting) < self.max_batch_size:
                        session.add(waiting.popleft())  # not all at once: each holds arrays for its longest answer
                    events = session.step()
                    self.stats.waiting += len(waiting)
                    bar.at(self.stats.finished, self.stats)
                    yield from events
        finally:
            self.model.train(training)

    def close(self) -> None:
        """Let go of what the engine holds beside the model. A `RayEngine` stops its workers."""
        self.runner = None

    def cache_size(self, requests: list[Request] | None) -> tuple[int, int]:
        """(pages, positions per page). Raises T3DError if a request can never fit.

        Small pages, so that memory goes where the tokens are; but one page per sequence, which is a little faster,
        where even the longest answers of all in flight would take little. With the prefix cache, pages are small, since
        whole ones are shared, and there is room for as many again as can be in flight.
        """
        if requests is None:
            longest = most = self.model.config.max_position_embeddings
            sides, rows = 1, max(self.max_batch_size, 2)  # a guided sequence takes two
        else:
            needs = [r.most_each for r in requests] or [(1,)]
            longest, most, sides = (max(map(f, needs)) for f in (max, sum, len))
            rows = min(self.max_batch_size, len(needs)) * sides
        each = bytes_per_token(self.model)
        budget = self.kv_cache_tokens or int(free_memory(self.model.device) * self.memory_share) // each
        size = self.page_size or ATTENTION[self.attention].page_size
        if size is None and not self.prefix_cache and longest * rows <= min(budget, _LITTLE // each):
            size = longest
        elif size is None:  # and leaving no more of the budget unused than the longest request allows
            sizes = (32, 16, 8, 4, 2) if self.prefix_cache else (64, 32, 16, 8, 4, 2)
            size = next((n for n in sizes if budget // n >= -(-most // n) + sides - 1), 1)
        pages = min(budget // size, -(-longest // size) * rows * (2 if self.prefix_cache else 1))
        for request in requests or ():
            check_fits(request, pages, size)
        return pages, size
