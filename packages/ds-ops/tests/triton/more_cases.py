"""Arguments that only kernels in Triton need to be tested on: those that other configs are for."""

from __future__ import annotations

from ds_core.ops.arguments import randn
from ds_core.ops.block_layout import BlockLayout
from ds_core.ops.layer_norm import reference as layer_norm
from ds_core.ops.rms_norm import reference as rms_norm
from ds_core.ops.sparse_attention import example, pattern
from ds_core.ops.sparse_attention import reference as sparse_attention

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


def _sparse_attention(device, dtype):
    """Heads too wide for the config of most."""
    layout = BlockLayout(pattern(5), 16, causal=True)
    return [example(device, dtype, (1, 1, 80, 72), layout, rpe=(1, 1))]


def _sparse_attention_backward(device, dtype):
    (args,) = _sparse_attention(device, dtype)
    grad = randn(device, dtype, *args[0].shape, seed=7)
    return [(grad, *args[:3], *sparse_attention(*args), *args[3:])]


#: By op: a function of device and dtype that makes them.
MORE = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "sparse_attention": _sparse_attention,
    "sparse_attention_backward": _sparse_attention_backward,
}
