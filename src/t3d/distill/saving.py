"""The student in one piece, whatever it is while it is trained."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from t3d.distill.lora import STUDENT, merged
from t3d.distill.sharding import Sharding
from t3d.models import FAMILIES
from t3d.models.load import cast


def whole_student(
    wrapped: nn.Module, sharding: Sharding, main: bool, dtype: torch.dtype, base: Callable[[], nn.Module], adapter: Path
) -> nn.Module | None:
    """The student as it is, on the CPU, in the main process; every process must call it.

    base: loads the model that training began with, for an adapter to be merged into; the adapter itself is written to
    the folder `adapter`.
    """
    model = sharding.unwrap(wrapped)
    adapted, weights = hasattr(model, "peft_config"), {}
    student = None if adapted else empty_like(model, "meta", dtype)
    dtypes = {} if adapted else {name: weight.dtype for name, weight in student.state_dict().items()}
    for name, weight in sharding.whole_weights(wrapped):
        if main and (not adapted or f".{STUDENT}." in name):
            weights[name] = weight.to("cpu", dtypes.get(name))
    if not main:
        return None
    if adapted:
        model.save_pretrained(adapter, state_dict=weights, selected_adapters=[STUDENT])
        return cast(merged(base(), adapter), dtype)
    student.load_state_dict(weights, strict=False, assign=True)
    student.tie_weights()
    return student


def family_of(model: nn.Module) -> type[nn.Module]:
    """Its family's class; `model` may be sharded."""
    return next(kind for kind in type(model).__mro__ if kind in FAMILIES.values())


def empty_like(model: nn.Module, device, dtype: torch.dtype) -> nn.Module:
    """A model of the same family and configuration, its weights not initialised; `model` may be sharded."""
    with torch.device(device):
        made = cast(family_of(model)(model.config), dtype)
    made.generation_config = model.generation_config
    return made.eval().requires_grad_(False)
