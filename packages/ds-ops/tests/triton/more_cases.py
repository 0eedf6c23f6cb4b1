"""Arguments that only kernels in Triton need to be tested on: those that other configs are for."""

from __future__ import annotations

import torch

from ds_core.ops.adam_step import cases as adam_step_cases
from ds_core.ops.arguments import randn
from ds_core.ops.attention import reference as attention
from ds_core.ops.block_layout import BlockLayout
from ds_core.ops.evoformer_attention import with_gradient
from ds_core.ops.grouped_mm_fp8 import fp8
from ds_core.ops.layer_norm import reference as layer_norm
from ds_core.ops.moe_gate import reference as moe_gate
from ds_core.ops.paged_attention import example, fp8_example
from ds_core.ops.quantize import reference as quantize
from ds_core.ops.quantized_weight import BITS, quantize_weight
from ds_core.ops.rms_norm import reference as rms_norm
from ds_core.ops.sample_tokens import settings
from ds_core.ops.sign_pack import reference as sign_pack
from ds_core.ops.sparse_attention import example as sparse_example
from ds_core.ops.sparse_attention import pattern
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


def _attention(device, dtype):
    """Rows and heads that begin at no multiple of 8 elements."""
    q = randn(device, dtype, 1, 9, 2, 36)[..., :32]
    k, v = randn(device, dtype, 1, 70, 1, 2, 34)[..., 2:].unbind(3)
    return [(q, k, v, None, None, 0.2, 20, 0)]


def _attention_backward(device, dtype):
    (args,) = _attention(device, dtype)
    grad = randn(device, dtype, 1, 9, 2, 33)[..., :32]
    return [(grad, None, *args[:3], *attention(*args), *args[3:])]


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


def _sparse_attention(device, dtype):
    """Heads too wide for the config of most."""
    layout = BlockLayout(pattern(5), 16, causal=True)
    return [sparse_example(device, dtype, (1, 1, 80, 72), layout, rpe=(1, 1))]


def _sparse_attention_backward(device, dtype):
    (args,) = _sparse_attention(device, dtype)
    grad = randn(device, dtype, *args[0].shape, seed=7)
    return [(grad, *args[:3], *sparse_attention(*args), *args[3:])]


def _adam_step(device, dtype):
    """A factor in float64, which steps are told as well."""
    scaled = [args for args in adam_step_cases(device, dtype) if None not in (args[6], args[4])]
    *tensors, factor = scaled[-1][:7]
    return [(*tensors, factor.double(), *scaled[-1][7:])]


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


def _grouped_mm(device, dtype):
    """More rows per expert, and columns, than the smallest tile has; rows of multiples of 16."""
    offsets = torch.tensor([50, 80], dtype=torch.int32, device=device)
    return [(randn(device, dtype, 80, 48), randn(device, dtype, 2, 48, 144, seed=3), offsets)]


def _grouped_mm_backward(device, dtype):
    ((a, _, offsets),) = _grouped_mm(device, dtype)
    return [(a, randn(device, dtype, 80, 144, seed=5), offsets)]


def _grouped_mm_fp8(device, dtype):
    offsets = torch.tensor([50, 80], dtype=torch.int32, device=device)
    scales = (randn(device, torch.float32, *shape).exp() for shape in ((80,), (2, 144)))
    return [(fp8(device, 80, 80), fp8(device, 2, 80, 144, seed=3), *scales, offsets, dtype)]


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


def _packed_weight(device, dtype, rows, out, depth, group, format):
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
        packed = _packed_weight(device, dtype, rows, out, depth, group, format)
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
        packed = _packed_weight(device, dtype, rows, out, depth, group, format)
        found.append((randn(device, dtype, rows, out), *packed, depth, BITS[format]))
    return found


#: By op: a function of device and dtype that makes them.
MORE = {
    "adam_step_": _adam_step,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "bias_activation_backward": _bias_activation_backward,
    "evoformer_attention": _evoformer_attention,
    "evoformer_attention_backward": _evoformer_attention_backward,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "paged_attention": _paged_attention,
    "sample_tokens": _sample_tokens,
    "sparse_attention": _sparse_attention,
    "sparse_attention_backward": _sparse_attention_backward,
    "grouped_mm": _grouped_mm,
    "grouped_mm_backward": _grouped_mm_backward,
    "grouped_mm_fp8": _grouped_mm_fp8,
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
    "weight_only_linear": _weight_only_linear,
    "weight_only_linear_backward": _weight_only_linear_backward,
}
