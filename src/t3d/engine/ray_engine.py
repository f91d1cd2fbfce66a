"""Many engines on a Ray cluster behind the interface of one. Ray is optional: `pip install t3d[ray]`."""

import os
import time
from collections import deque
from collections.abc import Iterator

import torch

from t3d.decoding.config import DecodingConfig
from t3d.engine.engine import Engine
from t3d.engine.intake import make_requests
from t3d.engine.kv_cache import bytes_per_token, dtype_of, free_memory
from t3d.engine.progress import Bar
from t3d.engine.request import Request
from t3d.engine.session import EngineStats, FinishedEvent
from t3d.errors import T3DError
from t3d.models.load import cast
from t3d.models.quantize import quantize

_TURN = 0.5  # seconds a worker decodes before it reports
_RESTARTS = 5  # deaths in a row without a finished sequence between them, after which we give up


def make_engine(model, tokenizer=None, *, workers: int = 0, address: str | None = None, **options):
    """An `Engine` in this process or, with `workers`, a `RayEngine`; other arguments are `Engine`'s."""
    if not workers:
        return Engine(model, tokenizer, **options)
    return RayEngine(model, tokenizer, workers=workers, address=address, **options)


def find_ray():
    """The module. Raises T3DError if Ray is not installed."""
    try:
        import ray
    except ImportError as error:
        raise T3DError("engine.workers needs Ray; install it with: pip install 't3d[ray]'") from error
    return ray


class _Worker:
    """What runs in an actor: an engine and its open session."""

    def __init__(self, model, tokenizer, options: dict, threads: int):
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.engine = Engine(_unpack(model).to(device), tokenizer, **options)

    def open(self, requests: list[Request], model: tuple | None) -> int:
        """Make a session whose cache is sized for these requests, with new weights if given. Returns the process id."""
        if model is not None:
            self.engine.model.load_state_dict(model[-1])
        self.session = self.engine.open(requests)
        return os.getpid()

    def decode(self, requests: list[Request]) -> list[FinishedEvent]:
        """Take on more requests, decode for a while, and hand over what has ended."""
        for request in requests:
            self.session.add(request)
        finished: list[FinishedEvent] = []
        end = time.monotonic() + _TURN
        while not self.session.done and (time.monotonic() < end or not finished):
            finished += [e for e in self.session.step() if isinstance(e, FinishedEvent)]
        return finished


class RayEngine:
    """`Engine` on `workers` processes of a Ray cluster: one GPU each, or an equal share of the CPUs.

    Prompts are handed out as places become free; a worker that dies is replaced and what it held is decoded again. The
    trajectories are those of one engine, whatever the number of workers. The cluster is the one at `address` (or
    RAY_ADDRESS; `ray://host:port` is a remote one), else one started on this machine. Other arguments are `Engine`'s.
    """

    def __init__(self, model, tokenizer=None, *, workers: int = 2, address: str | None = None, **options):
        if workers < 1:
            raise T3DError(f"engine.workers must be at least 1, got {workers}")
        ray = find_ray()
        self.ray, self.workers, self.options = ray, workers, options
        self.local = Engine(model, tokenizer, **options)  # checks the options and the requests
        self.model, self.tokenizer, self.max_batch_size = model, tokenizer, self.local.max_batch_size
        self.stats = EngineStats()
        if not ray.is_initialized():
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            except Exception as error:  # a bare one where its processes take more than 30 s to start
                where = address or os.environ.get("RAY_ADDRESS") or "this machine"
                raise T3DError(f"cannot join or start Ray at {where}: {str(error).splitlines()[0]}") from error
        resources = ray.cluster_resources()
        self.gpus = 1 if resources.get("GPU", 0) >= workers else 0
        self.cpus = max(1, int(resources.get("CPU", 1)) // workers)
        if resources.get("CPU", 1) < workers:
            raise T3DError(f"engine.workers = {workers}, but the Ray cluster has {resources.get('CPU', 0):.0f} CPUs")
        if options.get("kv_cache_tokens") is None and not self.gpus:  # workers on one machine share its memory
            budget = free_memory(torch.device("cpu")) // 2 // workers
            self.options = options | {"kv_cache_tokens": max(1, budget // bytes_per_token(model))}
        self._seen = self._versions()
        self._packed = ray.put(_pack(model))
        self._pool: list = [self._start() for _ in range(workers)]
        self.pids = [0] * workers

    def _start(self):
        actor = self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus)(_Worker)
        return actor.remote(self._packed, self.tokenizer, self.options, self.cpus)

    def _versions(self) -> list[tuple[int, int]]:
        return [(id(p), p._version) for p in self.model.parameters()]

    generate = Engine.generate

    def stream(
        self,
        prompts: list[str] | list[list[int]],
        config: DecodingConfig | list[DecodingConfig] | None = None,
        *,
        seeds: list[int] | None = None,
        names: list[str] | None = None,
        logprobs: int | None = None,
        progress: bool = False,
    ) -> Iterator[FinishedEvent]:
        """As `Engine.stream`, without the blocks: a sequence may be decoded again when its worker dies."""
        requests = make_requests(prompts, config, seeds, names, self.model, self.tokenizer, logprobs)
        self.local.cache_size(requests)
        return self._run(requests, progress)

    def _run(self, requests: list[Request], progress: bool) -> Iterator[FinishedEvent]:
        ray, stats = self.ray, EngineStats(sequences=len(requests))
        self.stats = stats
        if not requests:
            return
        weights = None
        if self._seen != (now := self._versions()):  # trained since
            self._seen, self._packed = now, ray.put(_pack(self.model))
            weights = self._packed
        largest = sorted(requests, key=lambda r: sum(r.most_each))
        # what a cache must hold; a guided one needs pages for two
        sizes = largest[-self.max_batch_size :] + [r for r in largest if r.guided][-1:]
        waiting, failures = deque(requests), 0
        held: list[dict[tuple[int, int], Request]] = [{} for _ in self._pool]
        calls: dict = {}  # pending call -> worker
        opening = [actor.open.remote(sizes, weights) for actor in self._pool]

        def hand_out(number: int) -> None:
            """Up to half a batch more than a worker decodes at once, and towards the end no more than its share."""
            room = self.max_batch_size * 3 // 2 - len(held[number])
            share = -(-len(waiting) // len(self._pool))
            more = [waiting.popleft() for _ in range(max(0, min(room, share)))]
            held[number] |= {(r.index, r.sample): r for r in more}
            if held[number]:
                calls[self._pool[number].decode.remote(more)] = number

        def replace(number: int) -> None:
            waiting.extendleft(reversed(held[number].values()))
            held[number], self.pids[number] = {}, 0
            ray.kill(self._pool[number])
            self._pool[number] = self._start()
            opening[number] = self._pool[number].open.remote(sizes, None)
            calls[opening[number]] = number

        calls |= {call: number for number, call in enumerate(opening)}
        with Bar(total=len(requests), desc="decoding", unit="seq", disable=not progress) as bar:
            while stats.finished < len(requests):
                (ready,), _ = ray.wait(list(calls), num_returns=1)
                number = calls.pop(ready)
                try:
                    result = ray.get(ready)
                except ray.exceptions.RayActorError as error:
                    failures += 1
                    if failures > _RESTARTS:
                        raise T3DError(
                            f"workers died {failures} times and finished nothing in between; "
                            "look at Ray's logs, or lower engine.max_batch_size"
                        ) from error
                    replace(number)
                    continue
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, T3DError):
                        raise error.cause from error
                    raise
                if ready == opening[number]:
                    self.pids[number], events = result, []
                else:
                    events = result
                failures = 0 if events else failures
                for event in events:
                    del held[number][event.index, event.sample]
                hand_out(number)
                stats.count(events)
                stats.running, stats.waiting = sum(map(len, held)), len(waiting)
                bar.at(stats.finished, stats)
                yield from events

    def close(self) -> None:
        """Stop the workers. Ray itself goes on until the program ends."""
        for actor in self._pool:
            self.ray.kill(actor)
        self._pool = []


def _pack(model) -> tuple:
    """What a worker needs to build the model, whatever device it is on here."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    quantized = getattr(model, "quantized", None)
    return type(model), model.config, model.generation_config, dtype_of(model), quantized, state


def _unpack(packed: tuple):
    family, config, generation_config, dtype, quantized, state = packed
    model = cast(family(config), dtype)
    if quantized:
        quantize(model, quantized, dtype)
    model.load_state_dict(state)
    model.generation_config = generation_config
    return model.eval()
