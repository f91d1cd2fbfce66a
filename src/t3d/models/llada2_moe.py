"""LLaDA2.0 and LLaDA2.1 (inclusionAI): experts behind sigmoid gates in groups, rotation of half of the channels.

Transformers' Glm4Moe computes just this; keys and names of weights in files are those of Ant's Bailing models. Files
say neither the block size nor the mask token, and of the stop tokens only the one that pads.
"""

from typing import ClassVar

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from t3d.errors import T3DError
from t3d.models.family import FamilyModel, PublishedConfig

# What the published configuration could say otherwise, and no published model does.
ALWAYS = {
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "use_bias": False,
    "norm_head": False,
    "using_split_qkv_in_self_attention": False,
}


class LLaDA2MoeConfig(PublishedConfig, Glm4MoeConfig):
    """Glm4Moe's configuration under the published keys, with the block size that all published models have."""

    model_type = "llada2_moe"
    implied = ("block_size", "mask_token_id")
    mask_tokens = ("<|mask|>",)
    stop_tokens = ("<|role_end|>", "<|endoftext|>")
    decoding: ClassVar = {"strategy": "low_confidence_dynamic", "threshold": 0.95, "floor": "schedule"}  # 2.0's
    keys: ClassVar = {
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "use_qkv_bias": "attention_bias",
    }
    block_size: int = 32
    mask_token_id: int | None = None

    def check(self) -> None:
        super().check()
        for key, value in ALWAYS.items():
            if getattr(self, key, value) != value:
                raise T3DError(f"{key} is {getattr(self, key)}; only {value} is supported in {self.model_type}")


class LLaDA2MoeModelLM(FamilyModel, Glm4MoeForCausalLM):
    """Logits at a position predict the token *at* that position. The caller gives the mask (see `t3d.blocks`)."""

    config_class = LLaDA2MoeConfig


class SplitHeads(ConversionOps):
    """Rows of all heads of queries, then keys, then values, as three; transformers has such a one only after 5.17."""

    def convert(self, input_dict, source_patterns, target_patterns, *, config, **kwargs):
        (found,) = input_dict.values()
        tensor = found[0] if isinstance(found, list) else found
        rows = [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        return {name: part.contiguous() for name, part in zip(target_patterns, tensor.split(rows), strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


register_checkpoint_conversion_mapping(
    "llada2_moe",
    [
        WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"\.attention\.dense\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
        WeightRenaming(r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
        WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
        WeightConverter(
            source_patterns="attention.query_key_value",
            target_patterns=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            operations=[SplitHeads()],
        ),
        *get_checkpoint_conversion_mapping("qwen2_moe"),  # experts one by one in files
    ],
    overwrite=True,
)
