"""Fast-dLLM v2 (arXiv 2509.26328): Qwen2.5 in blocks of 32 whose logits go on predicting the next token."""

from typing import ClassVar

from transformers import Qwen2Config, Qwen2ForCausalLM

from t3d.models.family import FamilyModel, PublishedConfig


class FastDLLMv2Config(PublishedConfig, Qwen2Config):
    """Qwen2's configuration; the block size is `bd_size` in files, and the mask token is only in the tokenizer's."""

    model_type = "Fast_dLLM_Qwen"
    implied = ("mask_token_id",)
    mask_tokens = ("|<MASK>|",)
    stop_tokens = ("<|im_end|>", "<|endoftext|>")
    shifts = (1,)
    keys: ClassVar = {"bd_size": "block_size"}
    decoding: ClassVar = {
        "flight": "next_token",
        "strategy": "low_confidence_dynamic",
        "threshold": 0.9,
        "window": 8,
    }
    block_size: int = 32
    mask_token_id: int | None = None
    logits_shift = 1  # no key of the files


class Fast_dLLM_QwenForCausalLM(FamilyModel, Qwen2ForCausalLM):
    """Named as in config.json. The caller gives the mask (see `t3d.blocks`)."""

    config_class = FastDLLMv2Config
