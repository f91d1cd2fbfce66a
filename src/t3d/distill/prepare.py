"""What a model needs before it is trained: a head to work in, attention for block masks, perhaps compiled layers."""

from collections.abc import Callable

from torch import Tensor, nn

from t3d.distill.config import T3DConfig
from t3d.distill.lora import plain


class Head(nn.Linear):
    """A language-model head inside whose forward an objective does its work: there a sharded model has it gathered."""

    def forward(self, hidden: Tensor, head: Callable[[Tensor, Tensor], object] | None = None):
        return super().forward(hidden) if head is None else head(hidden, self.weight)


def prepare(model: nn.Module, args: T3DConfig) -> None:
    """Give the model, in place, a `Head` and the attention that `args` asks for."""
    network = plain(model)
    network.get_output_embeddings().__class__ = Head
    network.set_attn_implementation(_attention(args))


def compile_layers(model: nn.Module, args: T3DConfig) -> None:
    """torch.compile every decoder layer in place; they are alike, so all but the first come from the cache."""
    for layer in plain(model).model.layers:
        layer.compile(**args.compile_options)


def _attention(args: T3DConfig) -> str:
    if args.attention != "auto":
        return args.attention
    cpu = "sdpa" if args.compile_layers else "block_sdpa"  # which the compiler cannot follow
    return {"cpu": cpu, "cuda": "flex_attention"}.get(args.device.type, "sdpa")
