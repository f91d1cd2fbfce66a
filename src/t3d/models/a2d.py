"""dllm's A2D (bd3lm, mdlm): Qwen3, Qwen2 or Llama, adapted to block diffusion or to full attention.

Nothing in the published files tells one from the other. `"block_size": null` in config.json says full attention, and
without the key they are blocks of 32, which the published sampler counts from the prompt's end.
"""

from typing import ClassVar

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from t3d.models.family import FamilyModel, PublishedConfig


class A2DConfig(PublishedConfig):
    """What the three have in common."""

    anchor = "prompt"
    decoding: ClassVar = {"schedule": "rounded"}
    implied = ("block_size", "mask_token_id")
    mask_tokens = ("<|mask|>", "<|MASK|>")

    @property
    def attention(self) -> str:
        return "full" if self.block_size is None else "block"

    @property
    def window(self) -> int:
        return 32 if self.block_size is None else self.block_size


class A2DQwen3Config(A2DConfig, Qwen3Config):
    model_type = "a2d-qwen3"
    stop_tokens = ("<|im_end|>", "<|endoftext|>")
    block_size: int | None = 32
    mask_token_id: int | None = None


class A2DQwen2Config(A2DConfig, Qwen2Config):
    model_type = "a2d-qwen2"
    stop_tokens = ("<|im_end|>", "<|endoftext|>")
    block_size: int | None = 32
    mask_token_id: int | None = None


class A2DLlamaConfig(A2DConfig, LlamaConfig):
    model_type = "a2d-llama"
    stop_tokens = ("<|eot_id|>",)
    block_size: int | None = 32
    mask_token_id: int | None = None


class A2DQwen3LMHeadModel(FamilyModel, Qwen3ForCausalLM):
    config_class = A2DQwen3Config


class A2DQwen2LMHeadModel(FamilyModel, Qwen2ForCausalLM):
    config_class = A2DQwen2Config


class A2DLlamaLMHeadModel(FamilyModel, LlamaForCausalLM):
    config_class = A2DLlamaConfig
