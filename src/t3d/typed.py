"""Values as in YAML, taken as a type or refused in one line."""

import json
import types
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from t3d.errors import T3DError, either

PYDANTIC = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())


def taken(value, annotation, name: str):
    """`value` (as in YAML) as the annotated type; raises T3DError with one line that gives name, type and value."""
    try:
        return _adapter(annotation).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError) as error:
        found = "null" if value is None else f"{value!r} ({type(value).__name__})"
        raise T3DError(f"{name} must be {type_name(annotation)}, got {found}") from error


@cache
def _adapter(annotation) -> TypeAdapter:
    return TypeAdapter(annotation, config=None if is_dataclass(annotation) else PYDANTIC)


def type_name(annotation: Any) -> str:
    """A type as a user writes it: `int or null`, `list of int`."""
    if annotation is type(None):
        return "null"
    if get_origin(annotation) in (Union, types.UnionType):
        names = sorted({type_name(a) for a in get_args(annotation)}, key=lambda name: name == "null")
        return either(names)
    if get_origin(annotation) in (list, tuple):
        return f"list of {type_name(get_args(annotation)[0])}" if get_args(annotation) else "list"
    if get_origin(annotation) is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, str):
        return "str"  # an enumeration of transformers is written as its value
    return getattr(annotation, "__name__", str(annotation).removeprefix("typing."))
