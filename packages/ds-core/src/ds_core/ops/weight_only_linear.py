"""Linear layers on weights of 8, 6 or 4 bits, for few rows: a decoder's next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_tensors,
    expect_together,
    randn,
    unaligned,
    wide,
)
from ds_core.ops.quantized_weight import (
    BITS,
    QuantizedWeight,
    check_packed,
    codes_shape,
    quantize_weight,
    room,
    unpack,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

__all__ = ["OPS", "QuantizedWeight", "quantize_weight", "weight_only_linear"]

NAME = "weight_only_linear"


def weight_only_linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x W^T + bias` with a weight that `quantize_weight` packed; x is not quantized.

    Args:
        x: `[..., in]`, any float dtype.
        weight: of `[out, in]`, on x's device.
        bias: `[out]`, x's dtype, or None.

    Returns `[..., out]` of x's dtype, summed in fp32. Differentiable in x and bias. With more
    rows than a few, weights may be rounded to x's dtype before they are multiplied.
    Raises OpError for shapes or dtypes that do not fit.
    """
    expect_tensors(NAME, x=x)
    packed_weight = isinstance(weight, QuantizedWeight)
    expect(packed_weight, NAME, "weight", type(weight).__name__, "what quantize_weight returned")
    depth = weight.shape[1]
    fits = x.dim() >= 1 and x.shape[-1] == depth
    expect(fits, NAME, "x", f"shape {list(x.shape)}", f"[..., {depth}]")
    packed = (weight.codes, weight.scales, weight.zeros)
    out: torch.Tensor = run(NAME, x.contiguous(), *packed, bias, weight.shape[0], weight.bits)
    return out


def reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    bits: int,
) -> torch.Tensor:
    """As `weight_only_linear`, with the fields of a `QuantizedWeight`; `bits` is 8, 6 or 4.

    Of 8 bits codes are int8 for int8 and uint8 for fp8_e4m3, of which none may be NaN.
    """
    _check(x, codes, scales, zeros, bias, outputs, bits)
    zeros = None if zeros is None else zeros.detach()
    weight = unpack(codes, scales.detach(), zeros, outputs, bits)
    y = wide(x) @ weight.to(wide(x).dtype).t()
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def backward_reference(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: int,
    bits: int,
) -> torch.Tensor:
    """The gradient of x, `grad W`, `[..., inputs]` of grad's dtype."""
    _check_backward(grad, codes, scales, zeros, inputs, bits)
    weight = unpack(codes, scales, zeros, grad.shape[-1], bits)
    return (wide(grad) @ weight.to(wide(grad).dtype)).to(grad.dtype)


def _check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    bits: int,
) -> None:
    expect_float(NAME, "x", x)
    expect(x.dim() >= 1, NAME, "x", "a scalar", "[..., in]")
    check_packed(NAME, codes, scales, zeros, outputs, x.shape[-1], bits)
    if bias is not None:
        expect_shape(NAME, "bias", bias, (outputs,))
        expect(bias.dtype == x.dtype, NAME, "bias", bias.dtype, x.dtype)
    expect_together(NAME, x, codes=codes, bias=bias)


def _check_backward(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: int,
    bits: int,
) -> None:
    expect_float(NAME, "grad", grad)
    expect(grad.dim() >= 1, NAME, "grad", "a scalar", "[..., out]")
    check_packed(NAME, codes, scales, zeros, grad.shape[-1], inputs, bits)
    expect_together(NAME, grad, codes=codes)


def fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    bits: int,
) -> torch.Tensor:
    _check(x, codes, scales, zeros, bias, outputs, bits)
    return x.new_empty((*x.shape[:-1], outputs))


def backward_fake(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: int,
    bits: int,
) -> torch.Tensor:
    _check_backward(grad, codes, scales, zeros, inputs, bits)
    return grad.new_empty((*grad.shape[:-1], inputs))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, codes, scales, zeros, bias, _, bits = inputs
    ctx.save_for_backward(codes, scales, zeros)
    ctx.inputs, ctx.bits = x.shape[-1], bits
    ctx.has_bias = bias is not None


def _backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> Any:
    codes, scales, zeros = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        packed = (codes, scales, zeros)
        dx = call("weight_only_linear_backward", grad.contiguous(), *packed, ctx.inputs, ctx.bits)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        dbias = wide(grad).reshape(-1, grad.shape[-1]).sum(0).to(grad.dtype)
    return dx, None, None, None, dbias, None, None


# --- Cases, refusals, floor -----------------------------------------------------------------------

#: Rows of x, outputs, inputs, group, format, whether symmetric: all paths and odd sizes.
_CASES: tuple[tuple[tuple[int, ...], int, int, int, str, bool], ...] = (
    ((1,), 70, 128, 64, "int8", True),
    ((1,), 64, 128, 32, "int4", True),
    ((), 37, 96, 48, "int4", False),
    ((2, 3), 17, 64, 64, "int8", False),
    ((15,), 32, 48, 16, "fp6_e3m2", True),
    ((1,), 1, 16, 16, "fp6_e3m2", True),
    ((33,), 37, 64, 32, "int4", False),
    ((40,), 18, 48, 16, "fp6_e3m2", True),
    ((0,), 3, 32, 32, "int8", True),
    ((3,), 50, 96, 32, "fp8_e4m3", True),
    ((34,), 19, 32, 16, "fp8_e4m3", True),
)


def _packed_fields(
    device: torch.device, out: int, depth: int, group: int, format: str, symmetric: bool
) -> tuple[Any, ...]:
    """The tensors of a random weight, with scales of each dtype in turn."""
    scale_dtype = FLOATS[(out + depth) % 3]
    w = randn(device, torch.float32, out, depth, seed=7)
    weight = quantize_weight(w, format, group=group, symmetric=symmetric, scale_dtype=scale_dtype)
    return weight.codes, weight.scales, weight.zeros, weight.bits


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Every format, few and many rows, with and without zeros and bias; unaligned views."""
    found: list[tuple[Any, ...]] = []
    for lead, out, depth, group, format, symmetric in _CASES:
        codes, scales, zeros, bits = _packed_fields(device, out, depth, group, format, symmetric)
        bias = randn(device, dtype, out) if out % 2 else None
        found.append((randn(device, dtype, *lead, depth), codes, scales, zeros, bias, out, bits))
    x, codes, scales, zeros, bias, out, bits = found[2]
    moved = tuple(unaligned(t) for t in (x, codes, scales, zeros, bias))
    return [*found, (*moved, out, bits)]


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for lead, out, depth, group, format, symmetric in _CASES:
        codes, scales, zeros, bits = _packed_fields(device, out, depth, group, format, symmetric)
        found.append((randn(device, dtype, *lead, out), codes, scales, zeros, depth, bits))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    codes, scales, zeros, bits = _packed_fields(device, 20, 64, 32, "int4", False)
    x = torch.ones(2, 64, device=device)
    return [
        ("x: got torch.int64", (x.long(), codes, scales, zeros, None, 20, bits)),
        ("codes: got torch.int64", (x, codes.long(), scales, zeros, None, 20, bits)),
        ("codes: got torch.int32", (x, codes, scales, zeros, None, 20, 8)),
        ("codes: got shape", (x, codes[:, 1:].contiguous(), scales, zeros, None, 20, bits)),
        ("scales: got shape", (x, codes, scales, zeros, None, 33, bits)),
        ("scales: ", (x[:, :40].contiguous(), codes, scales, zeros, None, 20, bits)),
        ("scales: ", (x, codes, scales.int(), zeros, None, 20, bits)),
        ("zeros: ", (x, codes, scales, zeros[:1], None, 20, bits)),
        ("zeros: got torch.float64", (x, codes, scales, zeros.double(), None, 20, bits)),
        ("bias: ", (x, codes, scales, zeros, x[0, :19], 20, bits)),
        ("bias: got torch.float16", (x, codes, scales, zeros, x[0, :20].half(), 20, bits)),
        ("bits: got 5", (x, codes, scales, zeros, None, 20, 5)),
        ("outputs: got 0", (x, codes, scales, zeros, None, 0, bits)),
    ]


def floor(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    bits: int,
) -> Floor:
    rows = x.numel() // x.shape[-1]
    read = sum(t.nbytes for t in (x, codes, scales, zeros, bias) if t is not None)
    return Floor(read, rows * outputs * x.element_size(), 2 * x.numel() * outputs)


def backward_floor(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: int,
    bits: int,
) -> Floor:
    rows = grad.numel() // grad.shape[-1]
    read = sum(t.nbytes for t in (grad, codes, scales, zeros) if t is not None)
    return Floor(read, rows * inputs * grad.element_size(), 2 * grad.numel() * inputs)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    x = randn(device, torch.bfloat16, 1, 4096)
    scales = randn(device, torch.bfloat16, 256, 32, 16)
    for format, bits in BITS.items():
        shape = codes_shape(4096, 4096, bits)
        codes = room(shape, torch.int8 if bits == 8 else torch.int32, device).random_()
        if format == "fp8_e4m3":
            codes = codes.clamp_(min=0, max=126).view(torch.uint8)
        found.append((f"{format} 1x4096x4096", (x, codes, scales, None, None, 4096, bits)))
    return found


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    codes, scales, zeros, bits = _packed_fields(device, 1024, 1024, 64, "int4", True)
    grad = randn(device, torch.bfloat16, 256, 1024)
    return [("int4 256x1024x1024", (grad, codes, scales, zeros, 1024, bits))]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int outputs, "
        "int bits) -> Tensor",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
        autograd=Autograd(_setup, _backward),
    ),
    Op(
        name="weight_only_linear_backward",
        schema="(Tensor grad, Tensor codes, Tensor scales, Tensor? zeros, int inputs, int bits) "
        "-> Tensor",
        reference=backward_reference,
        fake=backward_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=backward_cases,
        refused=lambda device: [],
        floor=backward_floor,
        benchmarks=backward_benchmarks,
    ),
)
