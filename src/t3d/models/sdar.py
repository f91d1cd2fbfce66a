"""SDAR (arXiv 2510.06303): Qwen3 with block-causal attention, on transformers' own classes, without remote code."""

from transformers import Qwen3Config, Qwen3ForCausalLM

from t3d.models.family import FamilyModel, PublishedConfig


class SDARConfig(PublishedConfig, Qwen3Config):
    """Qwen3's configuration with the block size and the mask token of a block-diffusion checkpoint."""

    model_type = "sdar"
    several_sizes = True  # derivatives are trained with 4 to 64
    block_size: int = 4
    mask_token_id: int | None = None


class SDARForCausalLM(FamilyModel, Qwen3ForCausalLM):
    """Logits at a position predict the token *at* that position. The caller gives the mask (see `t3d.blocks`)."""

    config_class = SDARConfig
    autoregressive = "qwen3"
