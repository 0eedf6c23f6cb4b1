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
from ds_core.ops.quantized_weight import BITS, codes_shape
from ds_core.ops.rope import rope_tables
from ds_ops.bench.gpu import attention

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


def _gate(device: torch.device) -> Cases:
    """Of DeepSeek-V3."""
    args = (8, True, "sigmoid", randn(device, torch.float32, 256), 8, 4, 2.5)
    return [("65536x256 fp32, 4 of 8 groups", (randn(device, torch.float32, 65536, 256), *args))]


def _gate_backward(device: torch.device) -> Cases:
    ((label, (logits, k, *_)),) = _gate(device)
    indices = _experts(device, len(logits), k, 256)
    grad = randn(device, torch.float32, len(logits), k)
    args = (grad, None, logits, logits.sigmoid(), indices, True, "sigmoid", 2.5)
    return [(label, args)]


def _experts(device: torch.device, tokens: int, k: int, experts: int) -> torch.Tensor:
    """Neighbours for each token, so that they differ."""
    first = torch.randint(experts, (tokens, 1), device=device)
    return ((first + torch.arange(k, device=device)) % experts).int()


def _permute(device: torch.device) -> Cases:
    x = randn(device, _LOW, _TOKENS, 2048)
    return [
        (f"{_TOKENS}x2048 bf16, 8 of 128", (x, _experts(device, _TOKENS, 8, 128), 128, None)),
        (f"{_TOKENS}x2048 bf16, capacity", (x, _experts(device, _TOKENS, 8, 128), 128, 1280)),
    ]


def _unpermute(device: torch.device) -> Cases:
    y, weights = randn(device, _LOW, _TOKENS * 8, 2048), torch.rand(_TOKENS, 8, device=device)
    row_map = torch.randperm(_TOKENS * 8, device=device).int().view(_TOKENS, 8)
    return [(f"{_TOKENS}x2048 bf16, 8 each", (y, row_map, weights))]


def _unpermute_backward(device: torch.device) -> Cases:
    ((label, (y, row_map, weights)),) = _unpermute(device)
    return [(label, (randn(device, _LOW, _TOKENS, 2048), y, row_map, weights, len(y)))]


def _grouped(device: torch.device) -> Cases:
    """Of Mixtral with many rows, of Qwen3-MoE with few."""
    found: Cases = []
    for rows, experts, k, n in ((2 * _TOKENS, 8, 4096, 14336), (512, 128, 2048, 768)):
        step = rows // experts
        offsets = torch.arange(step, rows + 1, step, dtype=torch.int32, device=device)
        a = randn(device, _LOW, rows, k)
        b = randn(device, _LOW, experts, n, k).transpose(1, 2)
        found.append((f"{rows}x{k}x{n}/{experts} bf16", (a, b, offsets)))
    return found


def _grouped_backward(device: torch.device) -> Cases:
    (label, (a, b, offsets)), _ = _grouped(device)
    return [(label, (a, randn(device, _LOW, len(a), b.shape[2]), offsets))]


def _grouped_fp8(device: torch.device) -> Cases:
    found: Cases = []
    for label, (a, b, offsets) in _grouped(device):
        scales = torch.ones(len(a), device=device), torch.ones(b.shape[::2], device=device)
        args = (a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), *scales, offsets, _LOW)
        found.append((label.replace("bf16", "fp8"), args))
    return found


def _scaled(device: torch.device) -> Cases:
    a = randn(device, _LOW, 8192, 8192).to(torch.float8_e4m3fn)
    one = torch.ones(1, device=device)
    return [("8192x8192x8192 fp8", (a, a.t(), one, one, None, _LOW))]


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


def _bias_activation(device: torch.device) -> Cases:
    x, bias = randn(device, _LOW, _TOKENS, 16384), randn(device, _LOW, 16384)
    return [(f"{_TOKENS}x16384 bf16 gelu_tanh", (x, bias, "gelu_tanh"))]


def _bias_activation_backward(device: torch.device) -> Cases:
    ((label, (x, bias, name)),) = _bias_activation(device)
    return [(label, (x.flip(0).contiguous(), x, bias, name))]


def _nhwc_bias_add(device: torch.device) -> Cases:
    x = randn(device, _LOW, 32, 320, 128, 128).contiguous(memory_format=torch.channels_last)
    bias = randn(device, _LOW, 320)
    return [("32x320x128x128 bf16 with another", (x, bias, x.clone(), bias))]


def _evoformer(device: torch.device) -> Cases:
    q, k, v = (randn(device, _LOW, 1, 512, 384, 8, 32, seed=seed) for seed in range(3))
    bias1, bias2 = randn(device, _LOW, 1, 512, 1, 1, 384), randn(device, _LOW, 1, 1, 8, 384, 384)
    return [("s512 n384 h8 d32 bf16", (q, k, v, bias1, bias2, 32**-0.5))]


def _evoformer_backward(device: torch.device) -> Cases:
    ((label, (q, k, v, bias1, bias2, scale)),) = _evoformer(device)
    # Not of these inputs, but as large: the time does not depend on it.
    lse = torch.full((1, 512, 8, 384), 7.0, device=device)
    rest = (bias1, bias2, v.clone(), lse, scale, [True, True])
    return [(label, (q.flip(1).contiguous(), q, k, v, *rest))]


def _quantized(
    device: torch.device, out: int, depth: int, format: str
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Codes, scales per 128 inputs, and no zeros."""
    shape = codes_shape(out, depth, BITS[format])
    if BITS[format] == 8:
        dtype = torch.uint8 if format.startswith("fp") else torch.int8
        codes = torch.randint(0, 127, shape, device=device, dtype=dtype)
    else:
        codes = torch.randint(-(1 << 31), (1 << 31) - 1, shape, device=device, dtype=torch.int32)
    return codes, randn(device, _LOW, out // 16, depth // 128, 16), None


def _weight_only_linear(device: torch.device) -> Cases:
    found: Cases = []
    for rows, out, depth, formats in (
        (1, 28672, 8192, tuple(BITS)),
        (16, 28672, 8192, ("int4",)),
        (4096, 14336, 4096, ("int4", "fp8_e4m3")),
    ):
        x = randn(device, _LOW, rows, depth)
        for format in formats:
            packed = _quantized(device, out, depth, format)
            label = f"{format} {rows}x{depth}x{out} bf16"
            found.append((label, (x, *packed, None, out, BITS[format])))
    return found


def _weight_only_linear_backward(device: torch.device) -> Cases:
    packed = _quantized(device, 14336, 4096, "int4")
    grad = randn(device, _LOW, 4096, 14336)
    return [("int4 4096x14336x4096 bf16", (grad, *packed, 4096, BITS["int4"]))]


#: What is not here is measured at the sizes of `Op.benchmarks`.
SIZES: Mapping[str, Callable[[torch.device], Cases]] = MappingProxyType(
    {
        **attention.SIZES,
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
        "bias_activation": _bias_activation,
        "bias_activation_backward": _bias_activation_backward,
        "nhwc_bias_add": _nhwc_bias_add,
        "evoformer_attention": _evoformer,
        "evoformer_attention_backward": _evoformer_backward,
        "cross_entropy": _cross_entropy,
        "cross_entropy_": _cross_entropy_in_place,
        "moe_gate": _gate,
        "moe_gate_backward": _gate_backward,
        "moe_permute": _permute,
        "moe_unpermute": _unpermute,
        "moe_unpermute_backward": _unpermute_backward,
        "grouped_mm": _grouped,
        "grouped_mm_backward": _grouped_backward,
        "grouped_mm_fp8": _grouped_fp8,
        "scaled_mm": _scaled,
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
        "weight_only_linear": _weight_only_linear,
        "weight_only_linear_backward": _weight_only_linear_backward,
    }
)
