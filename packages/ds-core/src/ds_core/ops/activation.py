"""Activations that ops share, and their derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activate(v: torch.Tensor, activation: str) -> torch.Tensor:
    """`activation` of v: "silu", "gelu" (by erf), "gelu_tanh" or "relu"."""
    if activation == "silu":
        return F.silu(v)
    if activation == "relu":
        return F.relu(v)
    return F.gelu(v, approximate="tanh" if activation == "gelu_tanh" else "none")


def slope(v: torch.Tensor, activation: str) -> torch.Tensor:
    """The derivative of the activation at v; of relu at 0: 0."""
    if activation == "relu":
        return (v > 0).to(v.dtype)
    if activation == "silu":
        s = torch.sigmoid(v)
        return s + v * s * (1 - s)
    if activation == "gelu":
        density = torch.exp(-0.5 * v * v) * 0.3989422804014327
        return 0.5 * torch.erfc(-v * 0.7071067811865476) + v * density
    # v * sigmoid(2 u), with u the argument of tanh
    twice, cubic = 1.5957691216057308, 0.07135481627260025
    s = torch.sigmoid(v * (twice + cubic * v * v))
    return s + v * s * (1 - s) * (twice + 3 * cubic * v * v)
