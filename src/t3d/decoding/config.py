"""How to decode: the settings a user chooses, checked when they are made."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import yaml

from t3d.components import check_name, check_values, load_all, merged, owners, setting
from t3d.decoding import flights, policies
from t3d.decoding.flight import FLIGHTS, Flight
from t3d.decoding.policy import POLICIES, SCHEDULES, Policy
from t3d.errors import T3DError, nearest
from t3d.typed import taken

load_all(policies.__name__, "t3d.policies")
load_all(flights.__name__, "t3d.flights")


Settings = TypeVar("Settings", bound="_General")


@dataclass(frozen=True)
class _General:
    """What every policy and flight takes. `None` means: take it from the model's folder (block size, stop ids)."""

    block_size: int | None = setting(None, "tokens per block; default: the model's own", low=1)
    steps: int | None = setting(None, "denoising steps per block, 1..block_size; default: block_size", low=1)
    schedule: str = setting("even", "how a block's tokens are spread over its steps", choices=tuple(SCHEDULES))
    window: int | None = setting(
        None, "commit in pieces of this many tokens, from left to right in the block; default: the whole block", low=1
    )
    approximate_cache: str = setting(
        "none",
        "where every token sees every other: compute the keys of what is before the block ('prefix'), or of all but "
        "the block ('dual'), at the block's first step alone; faster, and another answer",
        choices=("none", "prefix", "dual"),
    )
    strategy: str = setting("low_confidence_static", "unmasking strategy: which positions are committed at a step")
    flight: str = setting("multi_block", "what a forward computes, and when a block is final")
    confidence: str = setting(
        "untempered",
        "measured on the 'untempered' distribution or the 'sampling' one",
        choices=("untempered", "sampling"),
    )
    temperature: float = setting(0.0, "0 is greedy", low=0)
    top_k: int = setting(0, "sample among the k likeliest tokens; 0 is off", low=0)
    top_p: float = setting(
        1.0, "sample among the likeliest tokens with this total probability; 1 is off", above=0, high=1
    )
    guidance_scale: float = setting(
        0.0, "push away from what would be said without the question, by this much; 0 is off", low=0, high=100
    )
    negative_prompt: str | None = setting(None, "with guidance: push away from answers to this, instead")
    max_tokens: int = setting(256, "most tokens that count in a response", low=1)
    stop_ids: tuple[int, ...] | None = setting(None, "token ids that end a response; default: all of the model's")
    stop: tuple[str, ...] = setting((), "strings that end a response, besides the stop ids")
    ignore_eos: bool = setting(False, "do not end at the model's own stop ids")
    n: int = setting(1, "responses per prompt", low=1)
    seed: int = setting(0, "base seed; every sequence derives its own from it")

    def __post_init__(self):
        for name in ("stop_ids", "stop"):  # lists come from recipes; a tuple keeps the settings hashable
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))

        def check(ok: bool, message: str):
            if not ok:
                raise T3DError(message)

        check_name("strategy", self.strategy, POLICIES)
        check_name("flight", self.flight, FLIGHTS)
        check_values(self)
        check(all(self.stop), "a stop string must not be empty")
        check(self.negative_prompt != "", "negative_prompt is empty; leave it out to mask the question")
        check(
            self.negative_prompt is None or self.guidance_scale > 0,
            "negative_prompt does nothing without guidance; set guidance_scale above 0",
        )
        self.flying.check(self.policy, self)

    def at(self: Settings, block_size: int | None) -> Settings:
        """These settings with block size and steps filled in, for a model of this block size (None: a whole response).

        Raises T3DError."""
        block = self.block_size or block_size or self.max_tokens
        steps = self.steps or block
        if steps > block and self.schedule == "even":
            raise T3DError(f"steps = {steps} is more than block_size = {block}: a step commits at least one token")
        return replace(self, block_size=block, steps=steps)

    def canonical(self: Settings) -> Settings:
        """These settings without what their policy and flight do not look at, so that equal ones are equal."""
        used = {f.name for f in fields(self.policy)} | self.flying.used
        unused: dict[str, Any] = {name: f.default for name, f in OWNED.items() if name not in used}
        if not self.policy.uses_steps:
            unused |= {"steps": self.block_size, "schedule": "even"}
        return replace(self, **unused)

    @classmethod
    def others(cls) -> list[str]:
        """Names of the settings that neither a policy nor a flight owns, and that tell settings of a grid apart."""
        elsewhere = {"block_size", "strategy", "steps", "flight", "temperature", "seed", "max_tokens", "n"}
        return [f.name for f in fields(cls) if f.name not in {*OWNED, *elsewhere}]

    def differing(self, names) -> dict:
        """Those of the named settings that are not at their defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    @cached_property
    def policy(self) -> Policy:
        """The unmasking strategy with its own settings."""
        return self._component(POLICIES[self.strategy])

    @cached_property
    def flying(self) -> Flight:
        """The flight with its own settings."""
        return self._component(FLIGHTS[self.flight])

    def _component(self, owner: type):
        return owner(**{f.name: getattr(self, f.name) for f in fields(owner)})

    @classmethod
    def owners(cls, name: str) -> list[str]:
        """The policies and flights whose setting `name` is; empty for one that all take."""
        return owners([*POLICIES.values(), *FLIGHTS.values()], name)


OWNED = merged([*POLICIES.values(), *FLIGHTS.values()])  # the settings that policies and flights bring along

if TYPE_CHECKING:  # which cannot know what policies and flights bring along

    class DecodingConfig(_General):
        def __init__(self, **settings: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    DecodingConfig = make_dataclass(
        "DecodingConfig",
        [(name, f.type, field(default=f.default, metadata=f.metadata)) for name, f in OWNED.items()],
        bases=(_General,),
        frozen=True,
        namespace={
            "__doc__": "Settings of one decode: those that all take, and those of every policy and flight.",
            "__module__": __name__,
        },
    )


def parse_settings(texts: Iterable[str]) -> dict:
    """Settings from `key=value` texts, values as in YAML, each of its key's type.

    Raises:
        T3DError: one line: not of that form, an unknown key (with the nearest name), or a value of another type.
    """
    hints, found = get_type_hints(DecodingConfig), {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise T3DError(f"cannot understand {text!r}: write settings as key=value")
        if name not in hints:
            raise T3DError(f"unknown decoding setting {name!r}{nearest(name, hints)}")
        try:
            plain = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise T3DError(f"setting {name}: {value!r} is not valid YAML") from error
        found[name] = taken(plain, hints[name], f"setting {name}")
    return found
