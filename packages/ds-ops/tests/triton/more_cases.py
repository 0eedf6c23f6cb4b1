"""Arguments that only kernels in Triton need to be tested on: those that other configs are for."""

from __future__ import annotations

import torch

from ds_core.ops.arguments import randn
from ds_core.ops.layer_norm import reference as layer_norm
from ds_core.ops.quantized_weight import BITS, quantize_weight
from ds_core.ops.rms_norm import reference as rms_norm

#: Wider than a program's registers: rows are read in parts.
_WIDE = (5, 8200)


def _rms_norm(device, dtype):
    x = randn(device, dtype, *_WIDE)
    return [(x, x[0].clone(), 1e-6, x.flip(0).contiguous())]


def _rms_norm_backward(device, dtype):
    ((x, weight, eps, residual),) = _rms_norm(device, dtype)
    scale = rms_norm(x, weight, eps)[1]
    return [(randn(device, dtype, *_WIDE, seed=3), x, weight, scale, residual)]


def _layer_norm(device, dtype):
    x = randn(device, dtype, *_WIDE)
    return [(x, x[0].clone(), x[1].clone(), 1e-5, x.flip(0).contiguous())]


def _layer_norm_backward(device, dtype):
    ((x, weight, bias, eps, residual),) = _layer_norm(device, dtype)
    _, mean, scale, _ = layer_norm(x, weight, bias, eps)
    return [(randn(device, dtype, *_WIDE, seed=3), x, weight, mean, scale, residual)]


def _quantized(device, dtype, rows, out, depth, group, format):
    w = randn(device, torch.float32, out, depth, seed=rows)
    symmetric = format.startswith("fp")
    scale_dtype = torch.bfloat16 if dtype is torch.float32 else torch.float32
    weight = quantize_weight(w, format, group=group, symmetric=symmetric, scale_dtype=scale_dtype)
    return weight.codes, weight.scales, weight.zeros


def _weight_only_linear(device, dtype):
    """One row in several parts; tiles of 16, 64 and 128 rows, whole and in parts."""
    found = []
    shapes = [(1, 20, 592, 592, name) for name in ("int8", "fp8_e4m3")]
    shapes += [(1, 20, 1040, 208, name) for name in ("fp6_e3m2", "int4")]
    shapes += [(17, 35, 128, 32, "fp6_e3m2"), (70, 17, 128, 16, "int4"), (3, 40, 128, 128, "int8")]
    shapes += [(66, 130, 96, 96, "fp8_e4m3")]
    for rows, out, depth, group, format in shapes:
        packed = _quantized(device, dtype, rows, out, depth, group, format)
        bias = randn(device, dtype, out) if rows != 3 else None
        found.append((randn(device, dtype, rows, depth), *packed, bias, out, BITS[format]))
    return found


def _weight_only_linear_backward(device, dtype):
    found = []
    for rows, out, depth, group, format in (
        (5, 130, 64, 64, "int4"),
        (34, 17, 96, 32, "fp6_e3m2"),
        (3, 530, 32, 32, "fp8_e4m3"),
    ):
        packed = _quantized(device, dtype, rows, out, depth, group, format)
        found.append((randn(device, dtype, rows, out), *packed, depth, BITS[format]))
    return found


#: By op: a function of device and dtype that makes them.
MORE = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "weight_only_linear": _weight_only_linear,
    "weight_only_linear_backward": _weight_only_linear_backward,
}
