"""SDAR (arXiv 2510.06303): Qwen3 with block-causal attention, on transformers' own classes, without remote code."""

from collections.abc import Callable

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import t3d.block_attention  # noqa: F401  registers attn_implementation="block_sdpa"


class SDARConfig(Qwen3Config):
    """Qwen3's configuration with the block size and the mask token of a block-diffusion checkpoint."""

    model_type = "sdar"
    block_size: int = 4
    mask_token_id: int | None = None


class SDARForCausalLM(Qwen3ForCausalLM):
    """Logits at a position predict the token *at* that position. The caller gives the mask (see `t3d.blocks`)."""

    config_class = SDARConfig

    def forward(
        self,
        input_ids: Tensor,
        attention_mask=None,
        position_ids: Tensor | None = None,
        select: Tensor | None = None,
        head: Callable[[Tensor, Tensor], object] | None = None,
        **kwargs,
    ):
        """With `select` (flat indices into rows * length, `(m,)`), compute the language-model head only there.

        `head(hidden (m, width), weight (vocab, width))` replaces the plain projection and its result is returned; it
        runs inside forward, where a sharded model has its weights gathered. Otherwise as in transformers.
        """
        if select is None:
            return super().forward(input_ids, attention_mask, position_ids, **kwargs)
        hidden = self.model(
            input_ids=input_ids,
            attention_mask={"full_attention": attention_mask},
            position_ids=position_ids,
            use_cache=False,
            **kwargs,
        ).last_hidden_state
        hidden = hidden.flatten(0, 1)[select]
        return self.lm_head(hidden) if head is None else head(hidden, self.lm_head.weight)


AutoConfig.register("sdar", SDARConfig)
AutoModelForCausalLM.register(SDARConfig, SDARForCausalLM)
