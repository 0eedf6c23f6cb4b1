"""Arguments that only kernels in Triton need to be tested on: those that other configs are for."""

from __future__ import annotations

import torch

from ds_core.ops.arguments import randn
from ds_core.ops.layer_norm import reference as layer_norm
from ds_core.ops.moe_gate import reference as moe_gate
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


def _moe_gate(device, dtype):
    """More experts; groups of experts that are no power of two; infinite numbers."""
    logits = randn(device, dtype, 6, 20)
    logits[1, 3], logits[2], logits[3, ::2], logits[4, :19] = (torch.inf, *[-torch.inf] * 3)
    bias = randn(device, torch.float32, 300)
    return [
        (randn(device, dtype, 3, 300), 8, True, "sigmoid", bias, 1, 1, 1.0),
        (randn(device, dtype, 9, 160), 6, False, "softmax", None, 8, 3, 16.0),
        (logits, 5, False, "sigmoid", None, 1, 1, 1.0),
        (logits, 5, False, "sigmoid", None, 4, 2, 1.0),
    ]


def _moe_gate_backward(device, dtype):
    (args, *_) = _moe_gate(device, dtype)
    _, indices, _, p = moe_gate(*args)
    dw = randn(device, torch.float32, *indices.shape, seed=1)
    return [(dw, p.flip(0), args[0], p, indices, True, "softmax", 1.0)]


#: By op: a function of device and dtype that makes them.
MORE = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "moe_gate": _moe_gate,
    "moe_gate_backward": _moe_gate_backward,
}
