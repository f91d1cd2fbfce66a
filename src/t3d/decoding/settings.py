"""Settings that components own: a field of a policy or a flight says its default, help, bounds and whether it trades
speed for quality. Recipe keys, command-line options, the server's schema and the docs are made of these fields."""

from collections.abc import Iterable
from dataclasses import MISSING, Field, field, fields
from math import inf
from typing import Any

from t3d.errors import T3DError, nearest


def setting(
    default,
    help: str,
    *,
    low: float = -inf,
    high: float = inf,
    choices: tuple[str, ...] = (),
    slow: float | None = None,
    fast: float | None = None,
    values: tuple = (),
) -> Any:
    """A field of a component's settings.

    low, high: bounds, included. choices: what a text may be. slow, fast: ends of the range of the setting that trades
    speed for quality; from `slow` to `fast` more is committed per forward. values: what a search over settings tries.
    """
    about = {"help": help, "low": low, "high": high, "choices": choices, "slow": slow, "fast": fast, "values": values}
    return field(default=default, metadata=about)


def check_value(name: str, value, about: dict) -> None:
    """Raises T3DError if the value of setting `name` is none of its choices or out of its bounds."""
    low, high, choices = about.get("low", -inf), about.get("high", inf), about.get("choices", ())
    if choices:
        if value not in choices:
            known = " or ".join(repr(choice) for choice in choices)
            raise T3DError(f"{name} is {known}, got {value!r}{nearest(str(value), choices)}")
    elif not isinstance(value, str) and not low <= value <= high:
        if high < inf:
            raise T3DError(f"{name} must lie in {low:g}..{high:g}, got {value:g}")
        raise T3DError(
            f"{name} must be at least {low:g}, got {value:g}" if low else f"{name} must not be negative, got {value:g}"
        )


def merged(components: Iterable[type]) -> dict[str, Field]:
    """The fields of all components by name. Components may share a setting only if they mean the same by it.

    Raises:
        T3DError: if two components give one name different types, defaults, bounds or choices.
    """
    found: dict[str, tuple[Field, type]] = {}
    for component in components:
        for f in fields(component):
            if f.default is MISSING or "help" not in f.metadata:
                raise T3DError(f"{component.__name__}.{f.name} needs a default and a help text: use setting(...)")
            other, owner = found.setdefault(f.name, (f, component))
            keys = ("low", "high", "choices")
            if (f.type, f.default, *map(f.metadata.get, keys)) != (
                other.type,
                other.default,
                *map(other.metadata.get, keys),
            ):
                raise T3DError(
                    f"{component.__name__} and {owner.__name__} both have a setting {f.name!r} but mean different "
                    "things by it; rename one"
                )
    return {name: f for name, (f, _) in found.items()}
