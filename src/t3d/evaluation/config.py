"""The `eval` section of a recipe: the grid of decode settings."""

from dataclasses import dataclass, field, replace
from itertools import product

from t3d.decoding.calibration import load_decoding
from t3d.decoding.config import DecodingConfig
from t3d.decoding.policy import POLICIES
from t3d.errors import T3DError, nearest

KNOBS = tuple(sorted({p.speed().name for p in POLICIES.values() if p.speed()}))  # what strategies have instead of steps


def _help(text: str, **kwargs):
    return field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True)
class EvalConfig:
    """Which decode settings to evaluate, as a grid. The problems come from the task (`task.num_eval`)."""

    steps: tuple[int, ...] = _help("denoising steps per block, for strategies with a schedule", default=(4, 2, 1))
    strategy: tuple[str, ...] = _help("unmasking strategies", default=("low_confidence_static",))
    threshold: tuple[float, ...] = _help("confidence thresholds, for low_confidence_dynamic", default=(0.9,))
    floor: str = _help("fewest tokens a dynamic step commits: 'one', or 'schedule' for k_s", default="one")
    entropy_bound: tuple[float, ...] = _help("bounds in nats, for entropy-bounded strategies", default=(0.35,))
    factor: tuple[float, ...] = _help("bounds of Fast-dLLM's rule, for factor", default=(1.0,))
    risk: tuple[float, ...] = _help("wrong tokens a step may expect, for adaptive", default=(0.1,))
    decoding: tuple[str, ...] = _help("files of `t3d calibrate`: their settings beside the grid", default=())
    block_size: int | None = _help("tokens per block; default: the model's own", default=None)
    temperature: tuple[float, ...] = _help("0 is greedy", default=(0.0,))
    top_k: int = _help("sample among the k likeliest tokens; 0 is off", default=0)
    top_p: float = _help("sample among the likeliest tokens with this total probability; 1 is off", default=1.0)
    max_tokens: int = _help("most tokens that count in a response", default=256)
    samples: int = _help("responses per problem; more than one gives mean, pass@k and majority", default=1)
    seeds: tuple[int, ...] = _help("each is an evaluation of its own; default: the recipe's seed", default=())
    text: bool = _help("also BLEU, ROUGE-L, Distinct-n and agreement with the teacher; needs t3d[text]", default=False)
    scorer: str | None = _help("checkpoint (causal or block-diffusion) that gives texts a perplexity", default=None)
    split: str = _help("problems to evaluate on: test, dev or train", default="test")
    teacher: bool = _help("evaluate the teacher beside the student", default=True)
    checkpoints: tuple[str, ...] = _help(
        "further checkpoint folders to evaluate beside teacher and student", default=()
    )

    def __post_init__(self):
        lists = ("steps", "strategy", "temperature", *(name for name in KNOBS if hasattr(self, name)))
        for name in (*lists, "decoding", "seeds", "checkpoints"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists are welcome
        for name in self.strategy:
            if name not in POLICIES:
                raise T3DError(f"unknown strategy {name!r}{nearest(name, POLICIES)}; known: {', '.join(POLICIES)}")
        for name in lists:
            if not getattr(self, name):
                raise T3DError(f"{name} is an empty list: give at least one value")
        if self.samples < 1:
            raise T3DError(f"samples must be at least 1, got {self.samples}")
        if self.split not in ("test", "dev", "train"):
            raise T3DError(f"split is test, dev or train, got {self.split!r}")
        self.settings(seed=0)  # lets DecodingConfig check the values

    def settings(self, seed: int) -> list[DecodingConfig]:
        """Every setting of the grid, once; `seed` is used where `seeds` is empty.

        A strategy varies in steps, or in what it has instead: threshold, entropy_bound, factor or risk (and in steps
        too where its floor is the schedule).
        """
        grid = []
        sampling = {"top_k": self.top_k, "top_p": self.top_p, "max_tokens": self.max_tokens, "n": self.samples}
        for name, temperature, base in product(self.strategy, self.temperature, self.seeds or [seed]):
            knob = POLICIES[name].speed()
            floor = self.floor if hasattr(POLICIES[name], "floor") else DecodingConfig.floor
            steps = self.steps if knob is None or floor == "schedule" else [None]
            default = (getattr(DecodingConfig, knob.name),) if knob else ()
            values = [{knob.name: value} for value in getattr(self, knob.name, default)] if knob else [{}]
            for value, count in product(values, steps):
                grid.append(
                    DecodingConfig(
                        **value,
                        block_size=self.block_size,
                        steps=count,
                        strategy=name,
                        floor=floor,
                        temperature=temperature,
                        seed=base,
                        **sampling,
                    )
                )
        for path, temperature, base in product(self.decoding, self.temperature, self.seeds or [seed]):
            grid.append(replace(load_decoding(path), temperature=temperature, seed=base, **sampling))
        return list(dict.fromkeys(grid))
