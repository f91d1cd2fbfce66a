"""The `eval` section of a recipe: the grid of decode settings."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product
from typing import Any, get_args, get_origin, get_type_hints

from t3d.decoding.calibration import load_decoding
from t3d.decoding.config import DecodingConfig
from t3d.errors import T3DError, nearest
from t3d.typed import taken

ELSEWHERE = {"n": "eval.samples", "seed": "eval.seeds", "max_tokens": "eval.max_tokens"}  # one value for the whole grid


def _help(text: str, **kwargs):
    return field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True)
class EvalConfig:
    """Which decode settings to evaluate, as a grid. The problems come from the task (`task.num_eval`)."""

    grid: tuple[dict[str, Any], ...] = _help(
        "decode settings: mappings of the keys of `rollout` that say how to decode; a list of values stands for each",
        default=({"steps": [4, 2, 1]},),
    )
    decoding: tuple[str, ...] = _help("files of `t3d calibrate`: their settings beside the grid", default=())
    temperature: tuple[float, ...] = _help("0 is greedy; for items of the grid without one", default=(0.0,))
    top_k: int = _help("sample among the k likeliest tokens; 0 is off", default=0)
    top_p: float = _help("sample among the likeliest tokens with this total probability; 1 is off", default=1.0)
    max_tokens: int = _help("most tokens that count in a response", default=256)
    samples: int = _help("responses per problem; more than one gives mean, pass@k and majority", default=1)
    seeds: tuple[int, ...] = _help("each is an evaluation of its own; default: the recipe's seed", default=())
    text: bool = _help("also BLEU, ROUGE-L, Distinct-n and agreement with the teacher; needs t3d[text]", default=False)
    scorer: str | None = _help("checkpoint (causal or block-diffusion) that gives texts a perplexity", default=None)
    oracle: bool = _help(
        "also the tokens per forward of a decoder that knew the answer: the most that a strategy can reach",
        default=False,
    )
    split: str = _help("problems to evaluate on: test, dev or train", default="test")
    teacher: bool = _help("evaluate the teacher beside the student", default=True)
    checkpoints: tuple[str, ...] = _help(
        "further checkpoint folders to evaluate beside teacher and student", default=()
    )

    def __post_init__(self):
        for name in ("grid", "temperature", "decoding", "seeds", "checkpoints"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists are welcome
        for name in ("grid", "temperature"):
            if not getattr(self, name):
                raise T3DError(f"{name} is an empty list: give at least one value")
        if self.samples < 1:
            raise T3DError(f"samples must be at least 1, got {self.samples}")
        if self.split not in ("test", "dev", "train"):
            raise T3DError(f"split is test, dev or train, got {self.split!r}")
        self.settings(seed=0)  # lets DecodingConfig check the values

    def settings(self, seed: int) -> list[DecodingConfig]:
        """Every setting of the grid, once, in order; `seed` is used where `seeds` is empty."""
        whole = {"max_tokens": self.max_tokens, "n": self.samples}
        sampling = {"top_k": self.top_k, "top_p": self.top_p}
        found = []
        for number, item in enumerate(self.grid, 1):
            for values in _expanded(item, f"item {number} of grid"):
                temperatures = [values["temperature"]] if "temperature" in values else self.temperature
                for temperature, base in product(temperatures, self.seeds or [seed]):
                    given = sampling | values | whole | {"temperature": temperature, "seed": base}
                    found.append(DecodingConfig(**given))
        for path, temperature, base in product(self.decoding, self.temperature, self.seeds or [seed]):
            found.append(replace(load_decoding(path), temperature=temperature, seed=base, **sampling, **whole))
        return list(dict.fromkeys(found))


def _expanded(item: dict, where: str) -> Iterator[dict]:
    """Each setting that an item of the grid stands for. Raises T3DError that says where the item is wrong."""
    choices = []
    for name, given in item.items():
        if name in ELSEWHERE:
            raise T3DError(f"{where}: {name} is for the whole grid, set {ELSEWHERE[name]}")
        if name not in _types():
            raise T3DError(f"{where}: unknown key {name!r}{nearest(str(name), _types())}")
        annotation = _types()[name]
        takes_list = any(get_origin(part) is tuple for part in (annotation, *get_args(annotation)))
        several = isinstance(given, list | tuple) and not (takes_list and not any(isinstance(v, list) for v in given))
        if several and not given:
            raise T3DError(f"{where}: {name} is an empty list: give at least one value")
        choices.append([taken(value, annotation, f"{where}: {name}") for value in (given if several else [given])])
    for values in product(*choices):
        yield dict(zip(item, values, strict=True))


@cache
def _types() -> dict[str, Any]:
    hints = get_type_hints(DecodingConfig)
    return {f.name: hints[f.name] for f in fields(DecodingConfig) if f.name not in ELSEWHERE}
