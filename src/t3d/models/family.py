"""What the families share. A family is a file with a configuration, a model and its place in `FAMILIES`.

The rest of t3d asks three things of a model, so a family that differs more has three places to differ in:

- `config` has `block_size` and `mask_token_id`. Without blocks, the block size is the longest response.
- `forward` takes any attention mask from the caller (see `t3d.blocks`), and its logits at a position predict the token
  *at* that position. A family that predicts the next token shifts its hidden states here, so that nobody else has to
  know.
- files say what published checkpoints of the family say: names of weights, and keys of config.json.
"""

import json
from collections.abc import Callable

from torch import Tensor

from t3d.block_attention import BlockPlan
from t3d.errors import T3DError


class PublishedConfig:
    """Mixin of a configuration: config.json with the keys that engines on transformers 4 read, too.

    Transformers 5 writes `rope_parameters`, `dtype` and `num_local_experts`; who looks for `rope_theta` there and does
    not find it decodes with another one, without a word.
    """

    def check(self) -> None:
        """Raises T3DError for what the family's files may say and t3d cannot do."""
        if getattr(self, "use_sliding_window", False):
            raise T3DError("use_sliding_window is not supported: blocks attend to all earlier ones")

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(super().to_json_string(use_diff))
        rope = dict(values.get("rope_parameters") or {})
        if rope:
            values["rope_theta"] = rope.pop("rope_theta")
            values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        if "dtype" in values:
            values["torch_dtype"] = values["dtype"]
        if "num_local_experts" in values:
            values["num_experts"] = values.pop("num_local_experts")
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


class SelectiveHead:
    """Mixin of a causal model: a forward that computes the head only where it is asked for."""

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
        if isinstance(attention_mask, BlockPlan):  # transformers passes on 4-D tensors and keywords only
            attention_mask, kwargs["plan"] = input_ids.new_empty(0, 0, 0, 0), attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if select is None:
            return super().forward(**inputs, **kwargs)
        hidden = self.model(**inputs, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden.flatten(0, 1)[select]
        return self.lm_head(hidden) if head is None else head(hidden, self.lm_head.weight)
