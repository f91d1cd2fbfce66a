"""Linear layers with 8 or 4 bits per weight, for decoding only, by the kernels that PyTorch itself brings.

Only weights are rounded to so few bits; their inputs are rounded to bfloat16, and sums are kept in float32. Where few
tokens are decoded at once a forward waits for the weights, so fewer bytes are faster.
"""

import torch
from torch import Tensor, nn

from t3d.errors import T3DError, either

KINDS = ("int8", "int4")
GROUP = 32  # neighbouring inputs of an output that share a scale and an offset in 4 bits
PER_WEIGHT = {"int8": 1, "int4": 0.5 + 4 / GROUP}  # bytes, scales included; the head and odd shapes have 8 bits
_FEW = 24  # rows up to which the kernel for 8 bits is faster than making floating-point numbers of the weights
_PART = 1 << 24  # weights that are floating-point numbers at once


def check_kind(kind: str | None) -> None:
    """Raises T3DError unless it is None or one of KINDS."""
    if kind is not None and kind not in KINDS:
        raise T3DError(f"weights are quantised to {either(KINDS)}, not {kind!r}")


def quantize(model: nn.Module, kind: str, dtype: torch.dtype) -> nn.Module:
    """`model` with its linear layers in `kind` bits, in place; it computes in `dtype`, and cannot be trained or saved.

    8 bits instead of 4 have the head, whose errors go straight into the choice of tokens, and layers whose shape 4 bits
    do not fit. The embedding keeps the precision of its files: only single rows of it are read. Raises T3DError for
    another `kind`, and for a mixture of experts.
    """
    check_kind(kind)
    if any(weight.dim() > 2 for weight in model.parameters()):
        raise T3DError("the experts of a mixture cannot be quantised, only linear layers")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                small = kind == "int4" and layer is not head and Int4Linear.fits(layer)
                setattr(parent, name, (Int4Linear if small else Int8Linear)(layer, dtype))
    for weight in model.parameters():
        weight.requires_grad_(False)
        if weight is not embedding.weight:
            weight.data = weight.data.to(dtype)
    embedding.register_forward_hook(lambda module, inputs, output: output.to(dtype))
    model.quantized = kind
    return model


class _Quantized(nn.Module):
    """A linear layer that reads its weights as integers."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), of the same dtype."""
        out = self.product(x.reshape(-1, self.in_features).to(torch.bfloat16)).to(x.dtype)
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], self.out_features)

    def _parts(self):
        """Slices of outputs that have `_PART` weights."""
        step = max(16, _PART // self.in_features // 16 * 16)
        return [slice(at, at + step) for at in range(0, self.out_features, step)]


class Int8Linear(_Quantized):
    """An output's weights are whole numbers, -127 to 127, times its scale."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__(layer, dtype)
        weight = layer.weight.detach()
        scale = (weight.abs().amax(1).float().clamp(min=1e-20) / 127).to(torch.bfloat16)
        ints = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for part in self._parts():
            ints[part] = (weight[part].float() / scale[part, None].float()).round().clamp(-127, 127)
        self.register_buffer("ints", ints)
        self.register_buffer("scale", scale)

    def product(self, rows: Tensor) -> Tensor:
        if len(rows) <= _FEW and rows.device.type == "cpu":
            return torch._weight_int8pack_mm(rows, self.ints, self.scale)
        dtype = torch.float32 if rows.device.type == "cpu" else rows.dtype  # fast on any CPU
        columns = rows.to(dtype).t()  # on a CPU the faster way round, see `t3d.engine.runner`
        return torch.cat([self.ints[part].to(dtype) @ columns for part in self._parts()]).t() * self.scale


class Int4Linear(_Quantized):
    """The weights of each GROUP of an output are 16 evenly spaced numbers, from its smallest weight to its largest."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__(layer, dtype)
        ints, scales = [], []
        for part in self._parts():
            groups = layer.weight.detach()[part].float().view(-1, self.in_features // GROUP, GROUP)
            low, high = groups.amin(-1), groups.amax(-1)
            scale = ((high - low) / 15).clamp(min=1e-20).to(torch.bfloat16)
            offset = (low + 8 * scale.float()).to(torch.bfloat16)  # what the kernels add to `scale * (int - 8)`
            ints.append(((groups - offset[..., None].float()) / scale[..., None].float() + 8).round().clamp(0, 15))
            scales.append(torch.stack([scale, offset], dim=-1))
        self.register_buffer("ints", _packed(torch.cat(ints).flatten(1).int()))
        self.register_buffer("scale", torch.cat(scales).transpose(0, 1).contiguous())

    @staticmethod
    def fits(layer: nn.Linear) -> bool:
        """Whether the kernels take a layer of this shape."""
        inputs = GROUP if layer.weight.device.type == "cpu" else 128
        return layer.out_features % 16 == 0 and layer.in_features % inputs == 0

    def product(self, rows: Tensor) -> Tensor:
        if rows.device.type == "cpu":
            return torch._weight_int4pack_mm_for_cpu(rows, self.ints, GROUP, self.scale)
        return torch._weight_int4pack_mm(rows, self.ints, GROUP, self.scale)


def _packed(ints: Tensor) -> Tensor:
    """int32 (outputs, inputs) of 0 to 15, in the order of the device's kernel."""
    if ints.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(ints, 1)
    return torch._convert_weight_to_int4pack((ints[:, ::2] << 4 | ints[:, 1::2]).to(torch.uint8), 8)
