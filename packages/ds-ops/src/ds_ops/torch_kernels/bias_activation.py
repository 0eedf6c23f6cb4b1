"""bias_activation by torch's own activations, in the memory that the sum lies in."""

from __future__ import annotations

import torch

from ds_core.ops import bias_activation as op
from ds_core.ops.arguments import wide

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def bias_activation(x: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    """As the reference."""
    op.fake(x, bias, activation)
    total = wide(x) + bias
    if activation == "relu":
        total.relu_()
    elif activation == "silu":
        torch.ops.aten.silu_.default(total)
    else:
        torch.ops.aten.gelu_.default(total, approximate=_APPROXIMATE[activation])
    return total.to(x.dtype)


def bias_activation_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference."""
    _, dbias = op.backward_fake(grad, x, bias, activation)
    total, g = wide(x) + bias, wide(grad)
    if activation == "relu":
        dx = torch.ops.aten.threshold_backward.default(g, total, 0)
    elif activation == "silu":
        dx = torch.ops.aten.silu_backward.default(g, total)
    else:
        approximate = _APPROXIMATE[activation]
        dx = torch.ops.aten.gelu_backward.default(g, total, approximate=approximate)
    rows = dx.view(-1, x.shape[-1]) if x.shape[-1] else dx.view(1, 0)
    return dx.to(x.dtype), rows.sum(0).to(dbias.dtype)
