"""Dream (arXiv 2508.15487; DreamCoder, DiffuCoder): Qwen2 with full attention; logits predict the next token."""

from typing import ClassVar

from transformers import Qwen2Config, Qwen2ForCausalLM

from t3d.models.family import FamilyModel, PublishedConfig


class DreamConfig(PublishedConfig, Qwen2Config):
    """Qwen2's configuration with the mask token. No block size: the whole response is decoded at once."""

    model_type = "Dream"
    attention = "full"
    anchor = "prompt"
    logits_shift = 1
    shifts = (1,)
    decoding: ClassVar = {"schedule": "truncated", "strategy": "entropy"}
    implied = ("block_size",)
    mask_tokens = ("<|mask|>",)
    stop_tokens = ("<|im_end|>",)
    block_size: int | None = None
    mask_token_id: int | None = None


class DreamModel(FamilyModel, Qwen2ForCausalLM):
    config_class = DreamConfig
