"""Llama (SmolLM2, TinyLlama, Llama 3) as a block-diffusion model: no norms of queries and keys."""

from transformers import LlamaConfig, LlamaForCausalLM

from t3d.models.family import FamilyModel, PublishedConfig


class BlockLlamaConfig(PublishedConfig, LlamaConfig):
    """Llama's configuration with the block size, the mask token and the shift of a block-diffusion checkpoint."""

    model_type = "block_llama"
    shifts = (0, 1)
    block_size: int = 4
    mask_token_id: int | None = None
    logits_shift: int = 0


class BlockLlamaForCausalLM(FamilyModel, LlamaForCausalLM):
    """The caller gives the mask (see `t3d.blocks`)."""

    config_class = BlockLlamaConfig
    autoregressive = "llama"
