"""Sizes of large models, for ops whose own benchmarks are too small to fill a GPU.

By op: (label, arguments), made on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ds_core.ops.arguments import randn
from ds_core.ops.rope import rope_tables

Cases = list[tuple[str, tuple[Any, ...]]]

#: Tokens of a batch.
_TOKENS = 16384
_LOW = torch.bfloat16


def _rms_norm(device: torch.device) -> Cases:
    x, weight = randn(device, _LOW, _TOKENS, 8192), randn(device, _LOW, 8192)
    return [
        (f"{_TOKENS}x8192 bf16", (x, weight, 1e-6, None)),
        (f"{_TOKENS}x8192 bf16 residual", (x, weight, 1e-6, x.flip(0).contiguous())),
    ]


def _rms_norm_backward(device: torch.device) -> Cases:
    x, weight = randn(device, _LOW, _TOKENS, 8192), randn(device, _LOW, 8192)
    scale = x.float().square().mean(-1).add(1e-6).rsqrt()
    return [(f"{_TOKENS}x8192 bf16", (x.flip(0).contiguous(), x, weight, scale, None))]


def _layer_norm(device: torch.device) -> Cases:
    x, weight = randn(device, _LOW, _TOKENS, 8192), randn(device, _LOW, 8192)
    return [(f"{_TOKENS}x8192 bf16", (x, weight, weight, 1e-5, None))]


def _layer_norm_backward(device: torch.device) -> Cases:
    x, weight = randn(device, _LOW, _TOKENS, 8192), randn(device, _LOW, 8192)
    mean = x.float().mean(-1)
    scale = x.float().var(-1, unbiased=False).add(1e-5).rsqrt()
    return [(f"{_TOKENS}x8192 bf16", (x.flip(0).contiguous(), x, weight, mean, scale, None))]


def _rope(device: torch.device) -> Cases:
    table = rope_tables(torch.arange(8192, device=device), 128)
    x = randn(device, _LOW, 4, 8192, 32, 128)
    return [("b4 s8192 h32 d128 bf16", (x, *table, False, False, False))]


def _gated(device: torch.device) -> Cases:
    gate = randn(device, _LOW, _TOKENS, 14336)
    return [(f"{_TOKENS}x14336 bf16 silu", (gate, gate.flip(0).contiguous(), "silu"))]


def _gated_backward(device: torch.device) -> Cases:
    ((label, (gate, up, name)),) = _gated(device)
    return [(label, (up.clone(), gate, up, name))]


def _gated_packed(device: torch.device) -> Cases:
    return [(f"{_TOKENS}x28672 bf16 silu", (randn(device, _LOW, _TOKENS, 28672), "silu"))]


def _gated_packed_backward(device: torch.device) -> Cases:
    ((label, (x, name)),) = _gated_packed(device)
    return [(label, (randn(device, _LOW, _TOKENS, 14336), x, name))]


def _cross_entropy(device: torch.device) -> Cases:
    logits = randn(device, _LOW, 8192, 128256)
    targets = torch.randint(128256, (8192,), device=device)
    scale = torch.full((1,), 1 / 8192, device=device)
    rest = (targets, scale, -100, 0.0, 0.0, 0.0)
    return [("8192x128256 bf16 with gradient", (logits, *rest, True))]


def _cross_entropy_in_place(device: torch.device) -> Cases:
    return [(label, args[:-1]) for label, args in _cross_entropy(device)]


#: What is not here is measured at the sizes of `Op.benchmarks`.
SIZES: Mapping[str, Callable[[torch.device], Cases]] = MappingProxyType(
    {
        "rms_norm": _rms_norm,
        "rms_norm_backward": _rms_norm_backward,
        "layer_norm": _layer_norm,
        "layer_norm_backward": _layer_norm_backward,
        "rope": _rope,
        "rope_": _rope,
        "gated_activation": _gated,
        "gated_activation_backward": _gated_backward,
        "gated_activation_packed": _gated_packed,
        "gated_activation_packed_backward": _gated_packed_backward,
        "cross_entropy": _cross_entropy,
        "cross_entropy_": _cross_entropy_in_place,
    }
)
