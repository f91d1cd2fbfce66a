"""Settings, and the components that own some: policies, flights and objectives.

A field of a dataclass of settings says its default, help, bounds and whether it trades speed for quality. Recipe keys,
command-line options, the server's schema and the docs are made of these fields. A component is a frozen dataclass of
its own settings. Adding one is a file in its package, or a module that an installed package names under the group's
entry point.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from importlib.metadata import entry_points
from math import inf
from typing import Any

from t3d.errors import T3DError, either, nearest


def setting(
    default,
    help: str,
    *,
    low: float = -inf,
    high: float = inf,
    above: float = -inf,
    below: float = inf,
    choices: tuple[str, ...] = (),
    slow: float | None = None,
    fast: float | None = None,
    values: tuple = (),
    **more,
) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: its value where none is given.
        help: what it does, in one line.
        low: lowest value.
        high: highest value.
        above: bound that a value must be above.
        below: bound that a value must be below.
        choices: what a text may be.
        slow: end of the range of the setting that trades speed for quality.
        fast: the other end; from `slow` to `fast` more is committed per forward.
        values: what a search over settings tries.
        more: further metadata, e.g. `before`, what versions without the setting did.
    """
    about = {"help": help, "low": low, "high": high, "above": above, "below": below, "choices": choices}
    return field(default=default, metadata=about | {"slow": slow, "fast": fast, "values": values} | more)


def check_values(settings, name: str = "{}") -> None:
    """Raises T3DError if a field of a dataclass of settings is none of its choices or out of its bounds; None is in.

    name: what the message calls it, e.g. "task.{}".
    """
    for f in fields(settings):
        given = getattr(settings, f.name)
        for value in given if isinstance(given, list | tuple) else (given,):
            if value is not None:
                check_value(name.format(f.name), value, f.metadata)


def check_value(name: str, value, about: Mapping[str, Any]) -> None:
    """Raises T3DError if the value of setting `name` is none of its choices or out of its bounds."""
    low, high, choices = about.get("low", -inf), about.get("high", inf), about.get("choices", ())
    above, below = about.get("above", -inf), about.get("below", inf)
    if choices:
        if value not in choices:
            raise T3DError(f"{name} is {either(map(repr, choices))}, got {value!r}{nearest(str(value), choices)}")
    elif not isinstance(value, int | float) or (low <= value <= high and above < value < below):
        return
    elif max(low, above) > -inf and min(high, below) < inf:
        least = "" if low > -inf else f", above {above:g}"
        most = "" if high < inf else f", below {below:g}"
        raise T3DError(f"{name} must lie in {max(low, above):g}..{min(high, below):g}{least}{most}, got {value:g}")
    elif above > -inf:
        raise T3DError(f"{name} must be above {above:g}, got {value:g}")
    else:
        raise T3DError(
            f"{name} must be at least {low:g}, got {value:g}" if low else f"{name} must not be negative, got {value:g}"
        )


def merged(components: Iterable[type], defaults_may_differ: bool = False) -> dict[str, Field]:
    """The fields of all components by name. Components may share a setting only if they mean the same by it.

    Raises:
        T3DError: if two components give one name different types, defaults, bounds or choices.
    """

    def meaning(f: Field) -> tuple:
        default = None if defaults_may_differ else f.default
        return f.type, default, *map(f.metadata.get, ("low", "high", "above", "below", "choices"))

    found: dict[str, tuple[Field, type]] = {}
    for component in components:
        for f in fields(component):
            if f.default is MISSING or "help" not in f.metadata:
                raise T3DError(f"{component.__name__}.{f.name} needs a default and a help text: use setting(...)")
            other, owner = found.setdefault(f.name, (f, component))
            if meaning(f) != meaning(other):
                raise T3DError(
                    f"{component.__name__} and {owner.__name__} both have a setting {f.name!r} but mean different "
                    "things by it; rename one"
                )
    return {name: f for name, (f, _) in found.items()}


def owners(components: Iterable[Any], name: str) -> list[str]:
    """The names of the components whose setting `name` is."""
    return sorted(c.name for c in components if name in {f.name for f in fields(c)})


def load_all(package: str, group: str) -> None:
    """Import every module of a package, and those that installed packages name under an entry point."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    for point in entry_points(group=group):
        point.load()


def check_name(kind: str, name: str, known: dict) -> None:
    """Raises T3DError, with the nearest name, if `name` is none of the known."""
    if name not in known:
        raise T3DError(f"unknown {kind} {name!r}{nearest(name, known)}; known: {', '.join(known)}")
