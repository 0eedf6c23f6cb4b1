"""Sizes of large models, for ops whose own benchmarks are too small to fill a GPU.

By op: (label, arguments), made on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ds_core.ops.arguments import randn
from ds_core.ops.block_format import FORMATS
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


def _quantize_blocks(device: torch.device) -> Cases:
    x = randn(device, _LOW, _TOKENS, 8192)
    return [
        (f"{_TOKENS}x8192 bf16 {name}", (x, FORMATS[name].number, 128, True, None, 1, 1))
        for name in ("int8", "int4", "fp8_e4m3", "fp6_e3m2")
    ]


def _quantize_feedback(device: torch.device) -> Cases:
    x = randn(device, _LOW, _TOKENS, 8192)
    rest = (FORMATS["int4"].number, 128, True, None, 1, 1)
    return [(f"{_TOKENS}x8192 bf16 int4", (x, torch.zeros_like(x), 0.75, *rest))]


def _codes(device: torch.device, name: str, *shape: int) -> tuple[Any, ...]:
    """(codes, scales, zeros, format, block) of numbers in that shape."""
    *lead, width = shape
    row = FORMATS[name].packed_bytes(width)
    codes = torch.randint(256, (*lead, row), device=device, dtype=torch.uint8)
    scales = torch.ones(*lead, width // 128, device=device)
    return codes, scales, None, FORMATS[name].number, 128


def _dequantize_blocks(device: torch.device) -> Cases:
    return [
        (f"{_TOKENS}x8192 {name}", (*_codes(device, name, _TOKENS, 8192), _LOW, True))
        for name in ("int8", "int4", "fp6_e3m2")
    ]


def _quantized_reduce(device: torch.device) -> Cases:
    """What each of 8 ranks does with the gradients of 512 M parameters."""
    rest = (True, FORMATS["int4"].number, True, None)
    return [("8x64M int4", (*_codes(device, "int4", 8, 8192, 8192), *rest))]


def _quantized_reduce_feedback(device: torch.device) -> Cases:
    error = torch.zeros(8192, 8192, device=device)
    return [
        (label, (*args[:3], error, 0.75, *args[3:])) for label, args in _quantized_reduce(device)
    ]


def _fake_quantize(device: torch.device) -> Cases:
    x = randn(device, _LOW, _TOKENS, 4096)
    return [
        (f"{_TOKENS}x4096 bf16 8 bits", (x, None, 8, _TOKENS, True, None)),
        (f"{_TOKENS}x4096 bf16 4 bits one group", (x, None, 4, 1, True, None)),
    ]


def _fake_quantize_signs(device: torch.device) -> Cases:
    x = randn(device, _LOW, _TOKENS, 4096)
    return [(f"{_TOKENS}x4096 bf16 ternary", (x, _TOKENS, True))]


def _sign_pack(device: torch.device) -> Cases:
    x = randn(device, torch.float32, 1 << 26)
    return [("64M fp32", (x, 0, False)), ("64M fp32 chunks of 4096", (x, 4096, False))]


def _sign_pack_feedback(device: torch.device) -> Cases:
    return [(label, (x, torch.zeros_like(x), *rest)) for label, (x, *rest) in _sign_pack(device)]


def _sign_unpack(device: torch.device) -> Cases:
    codes = torch.randint(256, (1 << 23,), device=device, dtype=torch.uint8)
    return [("64M fp32", (codes, torch.ones(1, device=device), 1 << 26, torch.float32))]


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
        "quantize_blocks": _quantize_blocks,
        "quantize_feedback_": _quantize_feedback,
        "dequantize_blocks": _dequantize_blocks,
        "quantized_reduce": _quantized_reduce,
        "quantized_reduce_feedback_": _quantized_reduce_feedback,
        "fake_quantize": _fake_quantize,
        "fake_quantize_signs": _fake_quantize_signs,
        "sign_pack": _sign_pack,
        "sign_pack_feedback_": _sign_pack_feedback,
        "sign_unpack": _sign_unpack,
    }
)
