"""The `eval` section of a recipe: the grid of decode settings."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Any, get_args, get_origin, get_type_hints

from t3d.components import check_values, setting
from t3d.decoding.calibration import load_decoding
from t3d.decoding.config import DecodingConfig
from t3d.errors import T3DError, nearest
from t3d.typed import taken

ELSEWHERE = {"n": "eval.samples", "seed": "eval.seeds", "max_tokens": "eval.max_tokens"}  # one value for the whole grid


@dataclass(frozen=True)
class EvalConfig:
    """Which decode settings to evaluate, as a grid. The problems come from the task (`task.num_eval`)."""

    grid: tuple[dict[str, Any], ...] = setting(
        ({"steps": [4, 2, 1]},),
        "decode settings: mappings of the keys of `rollout` that say how to decode; a list of values stands for each",
    )
    decoding: tuple[str, ...] = setting((), "files of `t3d calibrate`: their settings beside the grid")
    temperature: tuple[float, ...] = setting((0.0,), "0 is greedy; for items of the grid without one")
    top_k: int = setting(0, "sample among the k likeliest tokens; 0 is off")
    top_p: float = setting(1.0, "sample among the likeliest tokens with this total probability; 1 is off")
    max_tokens: int = setting(256, "most tokens that count in a response")
    samples: int = setting(1, "responses per problem; more than one gives mean, pass@k and majority", low=1)
    seeds: tuple[int, ...] = setting((), "each is an evaluation of its own; default: the recipe's seed")
    text: bool = setting(False, "also BLEU, ROUGE-L, Distinct-n and agreement with the teacher; needs t3d[text]")
    scorer: str | None = setting(None, "checkpoint (causal or block-diffusion) that gives texts a perplexity")
    oracle: bool = setting(
        False, "also the tokens per forward of a decoder that knew the answer: the most that a strategy can reach"
    )
    split: str = setting("test", "problems to evaluate on: test, dev or train", choices=("test", "dev", "train"))
    teacher: bool = setting(True, "evaluate the teacher beside the student")
    checkpoints: tuple[str, ...] = setting((), "further checkpoint folders to evaluate beside teacher and student")

    def __post_init__(self):
        for name in ("grid", "temperature", "decoding", "seeds", "checkpoints"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists are welcome
        for name in ("grid", "temperature"):
            if not getattr(self, name):
                raise T3DError(f"{name} is an empty list: give at least one value")
        check_values(self)
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
