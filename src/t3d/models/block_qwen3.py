"""Qwen3 as a block-diffusion model that keeps the shift of its logits; without the shift it is `sdar`."""

from transformers import Qwen3Config, Qwen3ForCausalLM

from t3d.models.family import FamilyModel, PublishedConfig


class BlockQwen3Config(PublishedConfig, Qwen3Config):
    """Qwen3's configuration with the block size, the mask token and the shift of a block-diffusion checkpoint."""

    model_type = "block_qwen3"
    shifts = (1,)
    block_size: int = 4
    mask_token_id: int | None = None
    logits_shift: int = 1


class BlockQwen3ForCausalLM(FamilyModel, Qwen3ForCausalLM):
    """The caller gives the mask (see `t3d.blocks`)."""

    config_class = BlockQwen3Config
    autoregressive = "qwen3"
