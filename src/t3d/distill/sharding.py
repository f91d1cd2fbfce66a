"""Where the weights are when several processes train: the same everywhere (one process, DDP, ZeRO 1 and 2), or in
shards (FSDP2, ZeRO 3). The rest of the package asks here and knows nothing of backends."""

import copy
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from t3d.errors import T3DError
from t3d.log import log
from t3d.models.load import cast


class Sharding:
    """What accelerate was started with, as far as weights are concerned."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.device = accelerator.device
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        self.zero = plugin.zero_stage if plugin is not None else 0
        self.fsdp = accelerator.distributed_type == DistributedType.FSDP
        if self.fsdp and not accelerator.is_fsdp2:
            raise T3DError("FSDP 1 is not supported; set fsdp_version: 2, as recipes/accelerate/fsdp2.yaml does")
        asked = [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "") == "true"]
        if asked and not (self.fsdp or self.zero) and accelerator.is_main_process:
            log.warning("train: accelerate does not shard on a CPU; %s was asked for, this is DDP", asked[0])

    @property
    def sharded(self) -> bool:
        """Whether a process holds only a part of every weight."""
        return self.fsdp or self.zero == 3

    @property
    def name(self) -> str:
        if self.fsdp:
            return "fsdp2"
        return f"zero{self.zero}" if self.zero else "ddp" if self.accelerator.num_processes > 1 else "one process"

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The module without what DDP, DeepSpeed or torch.compile put around it."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def callable(self, model: nn.Module) -> nn.Module:
        """What to call for a forward without gradients: DDP's own forward would prepare for a backward."""
        return model if self.sharded else self.unwrap(model)

    def wrap_frozen(self, model: nn.Module) -> nn.Module:
        """A frozen model on this process's device, in shards where the student is."""
        if self.fsdp:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self.accelerator, model)
        if self.zero == 3:
            return _zero3(self.accelerator, model)
        if self.zero:  # the student's own weights are in this type, too
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
            model = cast(model, dtype)
        return model.to(self.device)

    def reshard(self, model: nn.Module) -> None:
        """Let go of what a forward gathered from the shards, so that the parameters are the shards."""
        if self.fsdp:
            for module in model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
        if self.zero == 3:  # DeepSpeed keeps small weights gathered
            for parameter in self.unwrap(model).parameters():
                if not parameter.requires_grad and parameter.ds_status.name == "AVAILABLE":
                    parameter.partition()

    def file(self, stem: str, reading: bool = False) -> str | None:
        """Where this process keeps its part of something; None if another one writes it."""
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        if self.sharded:
            return f"{stem}-{rank:05d}-of-{count:05d}.safetensors"
        return f"{stem}.safetensors" if reading or rank == 0 else None

    def whole_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every weight, gathered, one at a time, and the buffers that files hold. Every process must iterate to the
        end."""
        module = self.unwrap(model)
        stored = module.state_dict(keep_vars=True).keys()
        yield from ((name, buffer.detach()) for name, buffer in module.named_buffers() if name in stored)
        for name, parameter in module.named_parameters():
            if self.zero == 3:
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.detach().clone()
            elif hasattr(parameter, "full_tensor"):
                yield name, parameter.detach().full_tensor()
            else:
                yield name, parameter.detach()


def local_shard(parameter: Tensor) -> Tensor:
    """The part of a weight that this process holds, to read or write in place."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO 3
        return parameter.ds_tensor.data
    if hasattr(parameter, "to_local"):  # FSDP2's DTensor
        return parameter.to_local().detach()
    return parameter.detach()


def _zero3(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    config = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
    config["train_micro_batch_size_per_gpu"] = 1  # no batch is counted here; the key is required
    config.pop("train_batch_size", None)
    config["gradient_accumulation_steps"] = 1
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine
