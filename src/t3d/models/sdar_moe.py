"""SDAR's mixture of experts (SDAR-30B-A3B): Qwen3-MoE with block-causal attention.

In memory the experts of a layer are two tensors, as transformers 5 has them; in files every expert has its own
`model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight`, as published. The mapping is Qwen3-MoE's own.
"""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from t3d.models.family import FamilyModel, PublishedConfig


class SDARMoeConfig(PublishedConfig, Qwen3MoeConfig):
    """Qwen3-MoE's configuration with the block size and the mask token of a block-diffusion checkpoint."""

    model_type = "sdar_moe"
    several_sizes = True  # derivatives are trained with 4 to 64
    block_size: int = 4
    mask_token_id: int | None = None


class SDARMoeForCausalLM(FamilyModel, Qwen3MoeForCausalLM):
    """Logits at a position predict the token *at* that position. The caller gives the mask (see `t3d.blocks`)."""

    config_class = SDARMoeConfig
    autoregressive = "qwen3_moe"


register_checkpoint_conversion_mapping("sdar_moe", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True)
