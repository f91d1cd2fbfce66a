"""Qwen2 and Qwen2.5 as a block-diffusion model: biases of queries, keys and values, no norms of them."""

from transformers import Qwen2Config, Qwen2ForCausalLM

from t3d.models.family import FamilyModel, PublishedConfig


class BlockQwen2Config(PublishedConfig, Qwen2Config):
    """Qwen2's configuration with the block size, the mask token and the shift of a block-diffusion checkpoint."""

    model_type = "block_qwen2"
    shifts = (0, 1)
    block_size: int = 4
    mask_token_id: int | None = None
    logits_shift: int = 0


class BlockQwen2ForCausalLM(FamilyModel, Qwen2ForCausalLM):
    """The caller gives the mask (see `t3d.blocks`)."""

    config_class = BlockQwen2Config
    autoregressive = "qwen2"
