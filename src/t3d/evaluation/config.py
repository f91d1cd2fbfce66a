"""The `eval` section of a recipe: the grid of decode settings."""

from dataclasses import dataclass, field
from itertools import product

from t3d.decoding.config import DecodingConfig
from t3d.decoding.strategies import STRATEGIES
from t3d.errors import T3DError, nearest


def _help(text: str, **kwargs):
    return field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True)
class EvalConfig:
    """Which decode settings to evaluate, as a grid. The problems come from the task (`task.num_eval`)."""

    steps: tuple[int, ...] = _help("denoising steps per block, for strategies with a schedule", default=(4, 2, 1))
    strategy: tuple[str, ...] = _help("unmasking strategies", default=("low_confidence_static",))
    threshold: tuple[float, ...] = _help("confidence thresholds, for strategies that have one", default=(0.9,))
    floor: str = _help("fewest tokens a dynamic step commits: 'one', or 'schedule' for k_s", default="one")
    block_size: int | None = _help("tokens per block; default: the model's own", default=None)
    temperature: tuple[float, ...] = _help("0 is greedy", default=(0.0,))
    top_k: int = _help("sample among the k likeliest tokens; 0 is off", default=0)
    top_p: float = _help("sample among the likeliest tokens with this total probability; 1 is off", default=1.0)
    max_tokens: int = _help("most tokens that count in a response", default=256)
    samples: int = _help("responses per problem; more than one gives mean, pass@k and majority", default=1)
    seeds: tuple[int, ...] = _help("each is an evaluation of its own; default: the recipe's seed", default=())
    split: str = _help("problems to evaluate on: test, dev or train", default="test")
    checkpoints: tuple[str, ...] = _help(
        "further checkpoint folders to evaluate beside teacher and student", default=()
    )

    def __post_init__(self):
        for name in ("steps", "strategy", "threshold", "temperature", "seeds", "checkpoints"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists are welcome
        for name in self.strategy:
            if name not in STRATEGIES:
                raise T3DError(f"unknown strategy {name!r}{nearest(name, STRATEGIES)}; known: {', '.join(STRATEGIES)}")
        for name in ("steps", "strategy", "threshold", "temperature"):
            if not getattr(self, name):
                raise T3DError(f"{name} is an empty list: give at least one value")
        if self.samples < 1:
            raise T3DError(f"samples must be at least 1, got {self.samples}")
        if self.split not in ("test", "dev", "train"):
            raise T3DError(f"split is test, dev or train, got {self.split!r}")
        self.settings(seed=0)  # lets DecodingConfig check the values

    def settings(self, seed: int) -> list[DecodingConfig]:
        """Every setting of the grid, once; `seed` is used where `seeds` is empty.

        A scheduled strategy varies in steps, a dynamic one in threshold (and in steps where its floor is the schedule).
        """
        grid = []
        for name, temperature, base in product(self.strategy, self.temperature, self.seeds or [seed]):
            scheduled = STRATEGIES[name].scheduled
            thresholds = [DecodingConfig.threshold] if scheduled else self.threshold
            steps = self.steps if scheduled or self.floor == "schedule" else [None]
            for threshold, count in product(thresholds, steps):
                grid.append(
                    DecodingConfig(
                        block_size=self.block_size,
                        steps=count,
                        strategy=name,
                        threshold=threshold,
                        floor="one" if scheduled else self.floor,
                        temperature=temperature,
                        top_k=self.top_k,
                        top_p=self.top_p,
                        max_tokens=self.max_tokens,
                        n=self.samples,
                        seed=base,
                    )
                )
        return list(dict.fromkeys(grid))
