"""What the families share. A family is a file with a configuration, a model and its line in `FAMILIES`.

A family's file says what is particular to it; whatever it does not say is as in SDAR:

- its configuration (`PublishedConfig`): `block_size` and `mask_token_id`, with defaults where published files do not
  say them; who sees whom (`attention`, `anchor`); which shifts of the logits there are (`shifts`); `keys` of
  config.json that transformers calls otherwise; names of the mask and of the tokens that end a turn; how its
  published code decodes (`decoding`); what of it cannot be had (`check`);
- its model (`FamilyModel`): transformers' own class, the autoregressive model that becomes one of it, and how a layer
  is computed (`parts`, `norm_weight`), from which the engine makes its lean forward. The attention mask is the
  caller's, see `t3d.blocks`;
- names of weights in published files, where they differ: transformers' `register_checkpoint_conversion_mapping`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from t3d.block_attention import BlockPlan
from t3d.errors import T3DError, either


class PublishedConfig:
    """Mixin of a configuration: config.json with the keys that engines on transformers 4 read, too.

    Transformers 5 writes `rope_parameters`, `dtype` and `num_local_experts`; who looks for `rope_theta` there and does
    not find it decodes with another one, without a word.
    """

    logits_shift = 0  # 1: a row's logits predict the next token, as an autoregressive model's; 0: the row's own
    shifts = (0,)  # what `logits_shift` may be
    attention = "block"  # who is seen: "block": one's own block and all earlier ones; "full": everybody
    anchor = "start"  # where blocks and windows are counted from: position 0, or the end of the "prompt"
    several_sizes = False  # there are checkpoints whose block size is not the default, and not in their files
    keys: ClassVar[dict[str, str]] = {}  # names in config.json -> names in transformers, where they differ
    implied = ()  # keys of ours that published files leave out; what loading finds without them is not added
    mask_tokens = ()  # what tokenizers call the mask that do not say which token it is
    stop_tokens = ()  # what ends a turn in the chat template
    decoding: ClassVar[dict] = {}  # how the published sampler decodes, fields of `DecodingConfig`; else as SDAR's

    @property
    def window(self) -> int | None:
        """How many tokens are decoded together unless the settings say otherwise; None: the whole response."""
        return self.block_size

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """The configuration that a published config.json holds."""
        return super().from_dict({cls.keys.get(key, key): value for key, value in config_dict.items()}, **kwargs)

    def check(self) -> None:
        """Raises T3DError for what the family's files may say and t3d cannot do."""
        if getattr(self, "use_sliding_window", False):
            raise T3DError("use_sliding_window is not supported: blocks attend to all earlier ones")
        size = self.block_size
        if not (size is None and self.attention == "full") and not (isinstance(size, int) and size >= 1):
            raise T3DError(f"block_size is {size!r}; it must be a number of tokens, at least 1")
        if self.logits_shift not in self.shifts:
            raise T3DError(
                f"logits_shift is {self.logits_shift}, but model type {self.model_type!r} has {either(self.shifts)}"
            )

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(super().to_json_string(use_diff))
        rope = dict(values.get("rope_parameters") or {})
        if "rope_theta" in rope:
            values["rope_theta"] = rope.pop("rope_theta")
            if "partial_rotary_factor" in rope:
                values["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
            values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        if "dtype" in values:
            values["torch_dtype"] = values["dtype"]
        if "num_local_experts" in values:
            values["num_experts"] = values.pop("num_local_experts")
        values |= {key: values.pop(name) for key, name in self.keys.items() if name in values}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


@dataclass
class LayerParts:
    """A decoder layer: `h += norm(out(attend(q, k, v of norm(h))))`, then `h += norm(mlp(norm(h)))`.

    Norms are weights of RMS norms, `(width,)`, those of q and k `(head_dim,)`; None: there is none. Queries are rotated
    after their norm, and their products with keys divided by the root of head_dim. rotary: which of the model's tables.
    """

    attention_norm: Tensor
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    mlp_norm: Tensor
    mlp: nn.Module
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attention_out_norm: Tensor | None = None
    mlp_out_norm: Tensor | None = None
    rotary: str | None = None


class FamilyModel:
    """Mixin of a causal model of transformers: the head only where it is asked for, and its layers taken apart."""

    autoregressive: str | None = None  # the model type that `t3d convert` makes one of

    def forward(
        self,
        input_ids: Tensor,
        attention_mask=None,
        position_ids: Tensor | None = None,
        select: Tensor | None = None,
        head: Callable[[Tensor, Tensor], object] | None = None,
        **kwargs,
    ):
        """Logits `(rows, length, vocab)` at a position predict the token *at* that position, whatever the shift.

        With `select` (flat indices into rows * length, `(m,)`), compute the language-model head only on these rows; who
        predicts whom in a training row, `t3d.blocks.Layout.predictors` says. `head(hidden (m, width), weight (vocab,
        width))` replaces the plain projection and its result is returned; it runs inside forward, where a sharded model
        has its weights gathered. Otherwise as in transformers.
        """
        if isinstance(attention_mask, BlockPlan):  # transformers passes on 4-D tensors and keywords only
            attention_mask, kwargs["plan"] = input_ids.new_empty(0, 0, 0, 0), attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if select is None:
            result = super().forward(**inputs, **kwargs)
            if self.config.logits_shift:  # nobody predicts the first token; its own row stands in
                result.logits = torch.cat([result.logits[:, :1], result.logits[:, :-1]], dim=1)
            return result
        hidden = self.model(**inputs, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden.flatten(0, 1)[select]
        return self.lm_head(hidden) if head is None else head(hidden, self.lm_head.weight)

    @classmethod
    def parts(cls, layer: nn.Module) -> LayerParts:
        """A decoder layer taken apart; here by the names that most of transformers' models have."""
        a = layer.self_attn
        q_norm, k_norm = (getattr(a, name, None) for name in ("q_norm", "k_norm"))
        return LayerParts(
            attention_norm=cls.norm_weight(layer.input_layernorm),
            q=a.q_proj,
            k=a.k_proj,
            v=a.v_proj,
            out=a.o_proj,
            mlp_norm=cls.norm_weight(layer.post_attention_layernorm),
            mlp=layer.mlp,
            q_norm=None if q_norm is None else cls.norm_weight(q_norm),
            k_norm=None if k_norm is None else cls.norm_weight(k_norm),
        )

    @classmethod
    def norm_weight(cls, norm: nn.Module) -> Tensor:
        """What an RMS norm multiplies by."""
        return norm.weight
