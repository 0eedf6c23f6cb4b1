"""Arguments that only kernels in Triton need to be tested on: those that other configs are for."""

from __future__ import annotations

import torch

from ds_core.ops.arguments import randn
from ds_core.ops.block_layout import BlockLayout
from ds_core.ops.layer_norm import reference as layer_norm
from ds_core.ops.moe_gate import reference as moe_gate
from ds_core.ops.quantize import reference as quantize
from ds_core.ops.rms_norm import reference as rms_norm
from ds_core.ops.sign_pack import reference as sign_pack
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


def _quantize_blocks(device, dtype):
    """Blocks of a length between those of the op's cases."""
    x = randn(device, dtype, 3, 768)
    return [(x, 1, 256, False, 3, 1, 1), (x, 4, 384, True, None, 3, 2)]


def _quantize_feedback(device, dtype):
    cases = _quantize_blocks(device, dtype)
    return [(x, randn(device, dtype, *x.shape, seed=9), 0.5, *rest) for x, *rest in cases]


def _quantized(device, dtype):
    """(codes, scales, zeros, format, block), with the formats' zeros."""
    found = []
    for x, number, block, symmetric, *_ in _quantize_blocks(device, dtype):
        codes, scales, zeros = quantize(x, number, block, symmetric, None, 1, 1)
        found.append((codes, scales, None if symmetric else zeros, number, block))
    return found


def _dequantize_blocks(device, dtype):
    return [(*args, dtype, False) for args in _quantized(device, dtype)]


def _quantized_reduce(device, dtype):
    return [(*args, True, 7, True, 5) for args in _quantized(device, dtype)]


def _quantized_reduce_feedback(device, dtype):
    error = randn(device, torch.float32, 768, seed=9)
    return [
        (*args[:3], error, 0.5, *args[3:], False, 0, False, None)
        for args in _quantized(device, dtype)
    ]


def _fake_quantize(device, dtype):
    """Groups of a length between those of the op's cases."""
    x = randn(device, dtype, 2, 600)
    return [(x, None, 6, 2, True, None), (x, None, 4, 2, False, 1)]


def _fake_quantize_signs(device, dtype):
    return [(randn(device, dtype, 2, 600), 2, ternary) for ternary in (True, False)]


def _sign_pack(device, dtype):
    """Parts of many chunks, the last of each with a few numbers."""
    return [(randn(device, dtype, 2, 4104), 4104, True), (randn(device, dtype, 3, 264), 264, False)]


def _sign_pack_feedback(device, dtype):
    return [
        (x, randn(device, torch.float32, *x.shape, seed=9), *rest)
        for x, *rest in _sign_pack(device, dtype)
    ]


def _sign_unpack(device, dtype):
    return [(*sign_pack(*args), args[0].numel(), dtype) for args in _sign_pack(device, dtype)]


#: By op: a function of device and dtype that makes them.
MORE = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "sparse_attention": _sparse_attention,
    "sparse_attention_backward": _sparse_attention_backward,
    "moe_gate": _moe_gate,
    "moe_gate_backward": _moe_gate_backward,
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
