"""A linear layer that keeps its weight in 8, 6 or 4 bits: `WeightOnlyLinear`."""

from __future__ import annotations

import torch
from torch import nn

from ds_core.ops.arguments import expect, expect_shape
from ds_core.ops.quantized_weight import QuantizedWeight, quantize_weight
from ds_core.ops.registry import run


class WeightOnlyLinear(nn.Module):
    """`x W^T + bias` with a quantized weight; x and the sums stay floats.

        layer = WeightOnlyLinear.from_linear(model.lm_head, "int4", group=64)

    The weight is a constant: gradients flow to x and bias, so that adapters can be trained beside
    it. Its state dict holds `codes`, `scales`, `zeros` where there are any, and `bias`; it loads
    into a layer of the same shape, format and group. `.to(dtype)` converts scales and bias: from
    bf16 scales, the default, nothing is lost by fp32, but fp16 may be too narrow for them.

    Args:
        weight: what `quantize_weight` returned; its tensors are kept, not copied.
        bias: `[out]` in the dtype of the x to come, or None.

    Raises OpError for other weights, or a bias of another shape.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        packed = isinstance(weight, QuantizedWeight)
        told = type(weight).__name__
        expect(packed, "WeightOnlyLinear", "weight", told, "what quantize_weight returned")
        if bias is not None:
            expect_shape("WeightOnlyLinear", "bias", bias, weight.shape[:1])
        self.out_features, self.in_features = weight.shape
        self.format, self.group, self.bits = weight.format, weight.group, weight.bits
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str = "int8",
        group: int = 128,
        *,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.bfloat16,
    ) -> WeightOnlyLinear:
        """The same layer with its weight quantized; the arguments are `quantize_weight`'s.

        The bias is shared with `linear`. Raises OpError for what does not fit.
        """
        given = isinstance(linear, nn.Linear)
        told = type(linear).__name__
        expect(given, "WeightOnlyLinear.from_linear", "linear", told, "a torch.nn.Linear")
        weight = quantize_weight(
            linear.weight, format, group=group, symmetric=symmetric, scale_dtype=scale_dtype
        )
        return cls(weight, linear.bias).train(linear.training)

    @property
    def weight(self) -> QuantizedWeight:
        """The weight as it is now; raises OpError if a state dict brought NaN into it."""
        shape = (self.out_features, self.in_features)
        return QuantizedWeight(self.codes, self.scales, self.zeros, shape, self.format, self.group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]` of the same dtype."""
        expect(
            x.dim() >= 1 and x.shape[-1] == self.in_features,
            "weight_only_linear",
            "x",
            f"shape {list(x.shape)}",
            f"[..., {self.in_features}]",
        )
        packed = (self.codes, self.scales, self.zeros)
        y: torch.Tensor = run(
            "weight_only_linear", x.contiguous(), *packed, self.bias, self.out_features, self.bits
        )
        return y

    def extra_repr(self) -> str:
        """What `print(model)` shows between the parentheses."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format!r}, group={self.group}, "
            f"symmetric={self.zeros is None}"
        )
