"""Arguments that only kernels in Triton need to be tested on: those that other configs are for."""

from __future__ import annotations

import torch

from ds_core.ops.arguments import randn
from ds_core.ops.layer_norm import reference as layer_norm
from ds_core.ops.paged_attention import example, fp8_example
from ds_core.ops.rms_norm import reference as rms_norm
from ds_core.ops.sample_tokens import settings

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


def _paged_attention(device, dtype):
    """Few sequences, long and of all a head has: cut along the keys, also where there are none."""
    few = [(1, 1030), (2, 17)]
    *tensors, k_scale, v_scale = fp8_example(
        device, dtype, torch.float8_e5m2, [(1, 1060)], (3, 1), 128, 32
    )
    return [
        (*example(device, dtype, few, (4, 1), 128, 16), 0.1),
        (*example(device, dtype, few, (4, 1), 64, 16), 0.1, 700, 9.0),
        (*tensors, 0.1, None, None, k_scale, v_scale),
        (*example(device, dtype, [(20, 20)], (4, 1), 128, 16), 0.1),
        (*example(device, dtype, [(20, 20)], (2, 1), 256, 16), 0.1, 11),
    ]


def _sample_tokens(device, dtype):
    """A vocabulary for wide blocks."""
    logits = randn(device, dtype, 1, 4100)
    return [(logits, *settings(device, 1, 1.0, 40, 0.8))]


#: By op: a function of device and dtype that makes them.
MORE = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "paged_attention": _paged_attention,
    "sample_tokens": _sample_tokens,
}
