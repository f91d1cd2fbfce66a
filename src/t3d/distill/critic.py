"""The model that learns what the student writes: the fake score of distribution matching (DMD2, arXiv 2405.14867).

It starts as the student does, has an optimizer of its own, and is whole in every process.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t3d.distill.reference import without_doubles
from t3d.distill.sharding import Sharding
from t3d.errors import T3DError

WEIGHTS, OPTIMIZER = "critic.safetensors", "critic_optimizer.pt"  # in a checkpoint's folder


class Critic:
    """A copy of the student's weights that goes its own way, by AdamW at a constant rate.

    model: the module. max_norm: its gradients are clipped to this norm; 0: not at all.
    """

    def __init__(self, model: nn.Module, sharding: Sharding, learning_rate: float, max_norm: float):
        if sharding.sharded or sharding.zero:
            raise T3DError(f"a critic is whole in every process and does not go with {sharding.name}; use DDP")
        if sharding.accelerator.mixed_precision == "fp16":
            raise T3DError("a critic's loss is not scaled as train.fp16 needs it; use train.bf16")
        self.model = model.to(sharding.device).train()
        self.accelerator, self.max_norm = sharding.accelerator, max_norm
        self.optimizer = torch.optim.AdamW(self.model.parameters(), learning_rate, weight_decay=0.0)

    def update(self, loss: Callable[[], Tensor], times: int) -> Tensor:
        """Lower `loss()`, which is asked anew each time, by `times` steps; every process must call it.

        Returns the loss before the last of them, detached.
        """
        for _ in range(times):
            value = loss()
            value.backward()
            self._share_gradients()
            if self.max_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return value.detach()

    def _share_gradients(self) -> None:
        """Every process gets the mean of all gradients, so that the critics stay the same."""
        if self.accelerator.num_processes > 1:
            for weight in self.model.parameters():
                mine = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self.accelerator.reduce(mine, "mean")

    def save(self, folder: Path) -> None:
        """Write weights and optimizer to a checkpoint's folder; one process does."""
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(without_doubles(dict(self.model.named_parameters())), folder / WEIGHTS)
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote in `folder`.

        Raises:
            T3DError: if it was not, as by an objective without a critic.
        """
        if not (folder / OPTIMIZER).exists():
            raise T3DError(f"{folder} holds no critic to continue with; start anew in another folder")
        found = load_file(folder / WEIGHTS)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if name in found:  # tied weights are stored once
                    weight.copy_(found[name])
        self.optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
