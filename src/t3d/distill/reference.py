"""The frozen model that objectives compare the student with, and its rounds.

It is a copy of the student, sharded where the student is; with LoRA it is the student's own base model, with the
adapter off or, where rounds replace it, with a second adapter.
"""

import copy
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t3d.distill.lora import REFERENCE, STUDENT, adapter_weights, add_reference, reference_active
from t3d.distill.sharding import Sharding, local_shard
from t3d.errors import T3DError


class Reference:
    """A copy of the student's weights at some time.

    model: the module; with offloading its weights are in `weights` instead, on the CPU.
    """

    def __init__(self, model: nn.Module, sharding: Sharding, offload: bool = False):
        self.sharding = sharding
        self.model = model.requires_grad_(False).eval()
        self.weights: dict[str, Tensor] | None = None
        if offload:
            self.weights = _offload(self.model, sharding.device)
        else:
            self.model = sharding.wrap_frozen(self.model)

    @contextmanager
    def active(self, student: nn.Module):
        """Gives the module that is the reference; `student` is the one that is trained, wrapped as it is."""
        yield self.model

    def refresh(self, student: nn.Module, decay: float = 0.0) -> None:
        """`reference <- decay * reference + (1 - decay) * student`, shard by shard."""
        mix(self._own(), self._of(student), decay)

    def save(self, folder: Path) -> None:
        """Write the weights of this process; every process must call it."""
        name = self.sharding.file("reference")
        if name is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(without_doubles(self._own()), folder / name)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote in `folder`, if anything. Every process must call it."""
        if not list(folder.glob("reference*.safetensors")):
            return
        name = self.sharding.file("reference", reading=True)
        if not (folder / name).exists():
            raise T3DError(f"{folder} was saved by a different number of processes; continue with that number")
        found = load_file(folder / name)
        for key, weight in self._own().items():
            if key in found:  # tied weights are stored once
                weight.copy_(found[key])

    def _own(self) -> dict[str, Tensor]:
        if self.weights is not None:
            return self.weights
        return self._of(self.model)

    def _of(self, model: nn.Module) -> dict[str, Tensor]:
        self.sharding.reshard(model)
        return {name: local_shard(p) for name, p in self.sharding.unwrap(model).named_parameters()}


class AdapterReference(Reference):
    """The student's base model. `own_adapter`: with a second adapter that rounds replace; else with none."""

    def __init__(self, model: nn.Module, sharding: Sharding, own_adapter: bool):
        self.sharding, self.model, self.own_adapter = sharding, model, own_adapter
        if own_adapter:
            add_reference(model)

    @contextmanager
    def active(self, student: nn.Module):
        inner = self.sharding.unwrap(student)
        training = inner.training
        inner.eval()
        try:
            with reference_active(inner):
                yield self.sharding.callable(student)
        finally:
            inner.train(training)

    def _own(self) -> dict[str, Tensor]:
        return self._of(self.model, REFERENCE)

    def _of(self, model: nn.Module, adapter: str = STUDENT) -> dict[str, Tensor]:
        self.sharding.reshard(model)
        weights = adapter_weights(self.sharding.unwrap(model), adapter)
        return {name: local_shard(p) for name, p in weights.items()}

    def save(self, folder: Path) -> None:
        if self.own_adapter:
            super().save(folder)


@torch.no_grad()
def mix(own: dict[str, Tensor], student: dict[str, Tensor], decay: float) -> None:
    """`own <- decay * own + (1 - decay) * student` in place, by name."""
    for name, weight in own.items():
        if name in student:
            new = student[name].to(weight.device, weight.dtype)
            weight.copy_(new) if decay == 0 else weight.lerp_(new, 1 - decay)


def copy_of(model: nn.Module) -> nn.Module:
    """The model as it is now, once more."""
    with torch.no_grad():
        return copy.deepcopy(model)


def _offload(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Keep the weights on the CPU and bring each module's to `device` for its forward; the weights by name."""
    from accelerate import cpu_offload

    names = {name for name, _ in model.named_parameters()}
    copies, weights = {}, {}  # tied weights stay one
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) not in copies:
            copy_ = weight.detach().to("cpu", copy=True)
            copies[id(weight)] = copy_.pin_memory() if device.type == "cuda" else copy_
        weights[name] = copies[id(weight)]
    cpu_offload(model, execution_device=device, state_dict=weights)
    return {name: weights[name] for name in names}


def without_doubles(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without tied doubles, contiguous, as safetensors wants them."""
    seen, kept = set(), {}
    for name, tensor in weights.items():
        if tensor.numel() == 0 or tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[name] = tensor.detach().contiguous()
    return kept
