"""Gemma 3's text models (270M, 1B) as block-diffusion models.

Most of its layers see no more than `sliding_window` tokens back, while a block sees all before it. In a text that is no
longer than the window both are the same, so the context of the block-diffusion model ends there.
"""

from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from t3d.errors import T3DError
from t3d.models.family import FamilyModel, LayerParts, PublishedConfig


class BlockGemma3Config(PublishedConfig, Gemma3TextConfig):
    """Gemma 3's configuration with the block size, the mask token and the shift of a block-diffusion checkpoint."""

    model_type = "block_gemma3"
    shifts = (0, 1)
    block_size: int = 4
    mask_token_id: int | None = None
    logits_shift: int = 0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if "sliding_attention" in self.layer_types:
            self.max_position_embeddings = min(self.max_position_embeddings, self.sliding_window)

    def check(self) -> None:
        super().check()
        for key in ("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, key):
                raise T3DError(f"{key} is not supported: the published Gemma 3 text models have none")


class BlockGemma3ForCausalLM(FamilyModel, Gemma3ForCausalLM):
    """The caller gives the mask (see `t3d.blocks`). Norms also behind attention and MLP; two tables of rotations."""

    config_class = BlockGemma3Config
    autoregressive = "gemma3_text"

    @classmethod
    def parts(cls, layer: nn.Module) -> LayerParts:
        parts, a = super().parts(layer), layer.self_attn
        parts.q_norm = parts.q_norm * (a.scaling * a.head_dim**0.5)  # the scores' own scale instead of the usual one
        parts.attention_out_norm = cls.norm_weight(layer.post_attention_layernorm)
        parts.mlp_norm = cls.norm_weight(layer.pre_feedforward_layernorm)
        parts.mlp_out_norm = cls.norm_weight(layer.post_feedforward_layernorm)
        parts.rotary = a.layer_type
        return parts

    @classmethod
    def norm_weight(cls, norm: nn.Module) -> Tensor:
        return 1 + norm.weight
