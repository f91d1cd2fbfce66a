"""How to decode: the settings a user chooses, checked when they are made."""

from dataclasses import dataclass, field

from t3d.decoding.strategies import STRATEGIES
from t3d.errors import T3DError, nearest


def _help(text: str, **kwargs):
    return field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True)
class DecodingConfig:
    """Settings of one decode. `None` means: take it from the model's folder (block size, stop ids)."""

    block_size: int | None = _help("tokens per block; default: the model's own", default=None)
    steps: int | None = _help("denoising steps per block, 1..block_size; default: block_size", default=None)
    strategy: str = _help(
        "unmasking strategy: which positions are committed at a step", default="low_confidence_static"
    )
    threshold: float = _help("confidence above which a dynamic strategy commits", default=0.9)
    floor: str = _help("fewest tokens a dynamic step commits: 'one', or 'schedule' for k_s", default="one")
    entropy_bound: float = _help("nats that an entropy-bounded step may commit", default=0.35)
    factor: float = _help("the bound f of Fast-dLLM's factor rule", default=1.0)
    risk: float = _help("wrong tokens an adaptive step may expect; t3d.decoding.calibrate() chooses it", default=0.1)
    confidence: str = _help("measured on the 'untempered' distribution or the 'sampling' one", default="untempered")
    temperature: float = _help("0 is greedy", default=0.0)
    top_k: int = _help("sample among the k likeliest tokens; 0 is off", default=0)
    top_p: float = _help("sample among the likeliest tokens with this total probability; 1 is off", default=1.0)
    max_tokens: int = _help("most tokens that count in a response", default=256)
    stop_ids: tuple[int, ...] | None = _help("token ids that end a response; default: all of the model's", default=None)
    stop: tuple[str, ...] = _help("strings that end a response, besides the stop ids", default=())
    ignore_eos: bool = _help("do not end at the model's own stop ids", default=False)
    n: int = _help("responses per prompt", default=1)
    seed: int = _help("base seed; every sequence derives its own from it", default=0)

    def __post_init__(self):
        for name in ("stop_ids", "stop"):  # lists come from recipes; a tuple keeps the settings hashable
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))

        def check(ok: bool, message: str):
            if not ok:
                raise T3DError(message)

        check(self.block_size is None or self.block_size >= 1, f"block_size must be at least 1, got {self.block_size}")
        check(self.steps is None or self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        check(0 <= self.threshold <= 1, f"threshold must lie in 0..1, got {self.threshold}")
        check(self.floor in ("one", "schedule"), f"floor is 'one' or 'schedule', got {self.floor!r}")
        check(
            self.confidence in ("untempered", "sampling"),
            f"confidence is 'untempered' or 'sampling', got {self.confidence!r}",
        )
        for name in ("entropy_bound", "factor", "risk"):
            check(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        check(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")
        check(self.top_k >= 0, f"top_k must not be negative, got {self.top_k}")
        check(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        check(
            self.strategy in STRATEGIES,
            f"unknown strategy {self.strategy!r}{nearest(self.strategy, STRATEGIES)}; known: {', '.join(STRATEGIES)}",
        )
        check(self.n >= 1, f"n must be at least 1, got {self.n}")
        check(all(self.stop), "a stop string must not be empty")
        check(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
