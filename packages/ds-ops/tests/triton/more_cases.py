"""Arguments that only kernels in Triton need to be tested on: those that other configs are for."""

from __future__ import annotations

from ds_core.ops.arguments import randn
from ds_core.ops.evoformer_attention import with_gradient
from ds_core.ops.layer_norm import reference as layer_norm
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


def _evoformer_attention(device, dtype):
    """Wide heads; more than one tile of queries and of keys, and more sequences than parts."""
    found = []
    for batch, sequences, residues, heads, width in ((1, 1, 18, 2, 72), (1, 3, 66, 1, 8)):
        q, k, v = (
            randn(device, dtype, batch, sequences, residues, heads, width, seed=seed)
            for seed in range(3)
        )
        bias1 = randn(device, dtype, batch, sequences, 1, 1, residues)
        bias2 = randn(device, dtype, batch, 1, heads, residues, residues)
        found.append((q, k, v, bias1, bias2, width**-0.5))
    return found


def _evoformer_attention_backward(device, dtype):
    return [with_gradient(args) for args in _evoformer_attention(device, dtype)]


def _bias_activation_backward(device, dtype):
    """More columns than a strip has."""
    x = randn(device, dtype, 40, 150)
    return [(x.flip(0).contiguous(), x, x[0].clone(), "relu")]


#: By op: a function of device and dtype that makes them.
MORE = {
    "bias_activation_backward": _bias_activation_backward,
    "evoformer_attention": _evoformer_attention,
    "evoformer_attention_backward": _evoformer_attention_backward,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
}
