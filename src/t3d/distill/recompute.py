"""What the backward pass computes again instead of keeping it: everything but matrix products and attention."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import t3d.block_attention  # noqa: F401, its operator is named below

_aten = torch.ops.aten
KEPT = {
    torch.ops.t3d.block_attention.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def recompute_cheap(model: nn.Module) -> None:
    """Checkpoint each decoder layer, keeping the results of its products: norms, rotations and gates cost little time
    and hold more than half of the memory."""
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    checkpoint_layers(model, context_fn=contexts)


def checkpoint_layers(model: nn.Module, **settings) -> None:
    """Checkpoint each decoder layer; settings: of `torch.utils.checkpoint.checkpoint`."""
    name = "activation_checkpointing_enable"  # the new name of what follows, which warns where both are there
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False} | settings)


def _policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
