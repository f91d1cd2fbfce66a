"""What `/metrics` says, in Prometheus' text format."""

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from t3d.engine.session import EngineStats
from t3d.serve.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# of EngineStats: its field, our name, what it is
_COUNTERS = (
    ("finished", "t3d_sequences_finished", "answers decoded to their end"),
    ("cancelled", "t3d_sequences_cancelled", "answers given up because the client went away or time was up"),
    ("failed", "t3d_sequences_failed", "answers whose logits were not numbers"),
    ("tokens", "t3d_tokens", "tokens of finished answers, through the stop token"),
    ("forwards", "t3d_forwards", "forward passes of the model, whatever the batch"),
    (
        "sequence_forwards",
        "t3d_sequence_forwards",
        "forward passes that predicted tokens, summed over finished answers; tokens per one: TPF",
    ),
    ("cached_tokens", "t3d_prompt_tokens_cached", "prompt tokens not computed, since their keys were in the cache"),
    ("preemptions", "t3d_preemptions", "answers that had to make room in the cache and were computed again"),
)
_GAUGES = (
    ("running", "t3d_sequences_running", "sequences being decoded"),
    ("waiting", "t3d_sequences_waiting", "sequences in the queue"),
    ("kv_tokens", "t3d_kv_cache_tokens", "positions that the cache's pages in use can hold"),
    ("kv_budget_tokens", "t3d_kv_cache_budget_tokens", "positions that the whole cache can hold"),
)


class Metrics(Collector):
    """One registry per server; the engines' own counts are read when somebody asks."""

    def __init__(self, workers: Iterable[Worker]):
        self.workers = list(workers)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        labels = {"labelnames": ("path", "status"), "registry": self.registry}
        self._requests = Counter("t3d_http_requests", "requests answered", **labels)
        more = {"labelnames": ("model",), "registry": self.registry, "buckets": _SECONDS}
        self._first = Histogram("t3d_first_block_seconds", "from a request to its first block", **more)
        self._whole = Histogram("t3d_answer_seconds", "from a request to the end of its answer", **more)
        self.paths: set[str] = set()  # known ones; any other path is counted as "other"

    def answered(self, scope: dict, status: int) -> None:
        path = scope["path"] if scope["path"] in self.paths else "other"
        self._requests.labels(path, status).inc()

    def clock(self, model: str) -> Callable[[bool], None]:
        """Starts now. To be called with False at the first block, with True at the end."""
        start = time.perf_counter()

        def tell(end: bool) -> None:
            (self._whole if end else self._first).labels(model).observe(time.perf_counter() - start)

        return tell

    def collect(self):
        for kinds, family in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for field, name, about in kinds:
                metric = family(name, about, labels=["model"])
                for worker in self.workers:
                    stats: EngineStats = worker.stats
                    metric.add_metric([worker.name], getattr(stats, field))
                yield metric

    def text(self) -> bytes:
        return generate_latest(self.registry)
