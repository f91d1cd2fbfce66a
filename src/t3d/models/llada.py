"""LLaDA (arXiv 2502.09992): Llama with full attention, whose files have OLMo's keys and names of weights."""

import json
from typing import ClassVar

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from t3d.errors import T3DError
from t3d.models.family import FamilyModel, PublishedConfig

# What OLMo's configuration can say and Llama is not.
FIXED = {
    "activation_type": "silu",
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "rope": True,
    "alibi": False,
    "scale_logits": False,
    "include_bias": False,
    "include_qkv_bias": False,
}


class LLaDAConfig(PublishedConfig, LlamaConfig):
    """Llama's configuration with the mask token and the window that is decoded at once."""

    model_type = "llada"
    attention = "full"
    anchor = "prompt"
    implied = ("block_size",)
    mask_tokens = ("<|mdm_mask|>",)
    stop_tokens = ("<|eot_id|>", "<|endoftext|>")
    keys: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "weight_tying": "tie_word_embeddings",
        "activation_type": "hidden_act",
        "init_std": "initializer_range",
    }
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    block_size: int | None = 32
    mask_token_id: int | None = None

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        values = dict(config_dict)
        if values.get("embedding_size"):  # rows of the embedding, of which the vocabulary may use fewer
            values["vocab_size"] = values["embedding_size"]
        if values.get("mlp_hidden_size", 0) is None:
            values["mlp_hidden_size"] = values["mlp_ratio"] * values["d_model"]
        if values.get("n_kv_heads", 0) is None:
            values["n_kv_heads"] = 1 if values.get("multi_query_attention") else values["n_heads"]
        return super().from_dict(values, **kwargs)

    def check(self) -> None:
        super().check()
        for name, only in FIXED.items():
            if (value := getattr(self, self.keys.get(name, name), only)) != only:
                raise T3DError(f"{name} is {value!r}, but of LLaDA only {only!r} is supported")

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(super().to_json_string(use_diff))
        values["embedding_size"] = values["vocab_size"]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


class LLaDAModelLM(FamilyModel, LlamaForCausalLM):
    config_class = LLaDAConfig


# The one `ff_out` is the head, those of the blocks are of the MLPs: the head's is renamed first, and back last.
register_checkpoint_conversion_mapping(
    "llada",
    [
        WeightRenaming(r"^model\.transformer\.ff_out\.", "lm_head."),
        WeightRenaming(r"^model\.transformer\.wte\.", "model.embed_tokens."),
        WeightRenaming(r"^model\.transformer\.ln_f\.", "model.norm."),
        WeightRenaming(r"^model\.transformer\.blocks\.", "model.layers."),
        WeightRenaming(r"\.attn_norm\.", ".input_layernorm."),
        WeightRenaming(r"\.ff_norm\.", ".post_attention_layernorm."),
        WeightRenaming(r"\.q_proj\.", ".self_attn.q_proj."),
        WeightRenaming(r"\.k_proj\.", ".self_attn.k_proj."),
        WeightRenaming(r"\.v_proj\.", ".self_attn.v_proj."),
        WeightRenaming(r"\.attn_out\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.ff_proj\.", ".mlp.gate_proj."),
        WeightRenaming(r"\.up_proj\.", ".mlp.up_proj."),
        WeightRenaming(r"\.ff_out\.", ".mlp.down_proj."),
    ],
    overwrite=True,
)
