"""Root-mean-square normalization. Source: Zhang and Sennrich 2019, equation 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch

from ds_core.ops.arguments import (
    FLOATS,
    compact,
    expect,
    expect_float,
    expect_like,
    expect_shape,
    expect_together,
    randn,
    unaligned,
    wide,
    wide_dtype,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "rms_norm"


@overload
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in fp32.

    x: `[..., d]`, any float dtype; weight: `[d]`, x's dtype or fp32. Returns x's shape and dtype.
    With a residual, like x: `(norm of x + residual, x + residual)`, the sum rounded to x's dtype,
    in one pass. Differentiable in x, weight and residual; the weight's gradient is summed in fp32.
    Raises OpError for shapes or dtypes that do not fit.
    """
    y, _, total = run(NAME, x.contiguous(), weight, eps, compact(residual))
    return y if residual is None else (y, total)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm; `1 / sqrt(mean(x^2) + eps)` of each row, `[...]`, fp32; the sum.

    With a residual it is the sum that is normalized; without, the sum is empty, `[0]`.
    """
    _check(x, weight, eps, residual)
    total = x.new_empty(0)
    if residual is not None:
        x = total = x + residual
    x32 = wide(x)
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * wide(weight)).to(x.dtype), scale.squeeze(-1), total


def backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of what was normalized and of weight: with n = x * scale and g = grad * weight,

    `dx = scale * (g - n * mean(g * n)) + grad_sum` and `dweight = sum over rows of grad * n`.
    """
    _check_backward(grad, x, weight, scale, grad_sum)
    wide_grad, scale = wide(grad), scale.unsqueeze(-1)
    normal = wide(x) * scale
    g = wide_grad * wide(weight)
    dx = scale * (g - normal * (g * normal).mean(-1, keepdim=True))
    if grad_sum is not None:
        dx = dx + wide(grad_sum)
    dweight = (wide_grad * normal).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _check(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> None:
    expect_float(NAME, "x", x)
    expect(x.dim() >= 1, NAME, "x", "a scalar", "[..., d]")
    expect_shape(NAME, "weight", weight, x.shape[-1:])
    allowed = weight.dtype in (x.dtype, torch.float32)
    expect(allowed, NAME, "weight", weight.dtype, f"{x.dtype} or torch.float32")
    expect_together(NAME, x, weight=weight, residual=residual)
    expect(eps >= 0, NAME, "eps", eps, "0 or more")
    if residual is not None:
        expect_like(NAME, "residual", residual, x)


def _check_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None,
) -> None:
    _check(x, weight, 0.0)
    expect_like(NAME, "grad", grad, x)
    expect_shape(NAME, "scale", scale, x.shape[:-1])
    expect(scale.dtype == wide_dtype(x.dtype), NAME, "scale", scale.dtype, wide_dtype(x.dtype))
    if grad_sum is not None:
        expect_like(NAME, "grad_sum", grad_sum, x)
    expect_together(NAME, x, grad=grad, scale=scale, grad_sum=grad_sum)


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, weight, eps, residual)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype)), total


def backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_backward(grad, x, weight, scale, grad_sum)
    return torch.empty_like(x), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, residual = inputs
    _, scale, total = output
    ctx.added = residual is not None
    ctx.mark_non_differentiable(*([scale] if ctx.added else [scale, total]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.added else x, weight, scale)


def _backward(
    call: Callable[..., Any],
    ctx: Any,
    grad: torch.Tensor | None,
    _: Any,
    grad_sum: torch.Tensor | None,
) -> Any:
    x, weight, scale = ctx.saved_tensors
    if grad is None:  # only the sum was used
        return grad_sum, None, None, grad_sum
    added = compact(grad_sum) if ctx.added else None
    dx, dweight = call("rms_norm_backward", grad.contiguous(), x, weight, scale, added)
    return dx, dweight, None, dx if ctx.added else None


_SHAPES = (((4, 16), 64), ((3,), 127), ((2, 5), 1003), ((1,), 1), ((0,), 8), ((), 33))


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Ordinary, odd, single and empty shapes; an unaligned view; a weight in fp32; a residual."""
    found = [
        (randn(device, dtype, *lead, d), randn(device, dtype, d), 1e-6, None) for lead, d in _SHAPES
    ]
    x, weight, eps, _ = found[2]
    residual = randn(device, dtype, *x.shape, seed=1)
    return [
        *found,
        (unaligned(x), unaligned(weight), eps, None),
        (x, weight.float(), eps, None),
        (x, weight, eps, residual),
    ]


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found = []
    for x, weight, eps, residual in cases(device, dtype):
        scale = reference(x, weight, eps)[1]
        grad = randn(device, dtype, *x.shape, seed=2)
        found.append((grad, x, weight, scale, residual))
    many = randn(device, dtype, 331, 40)  # more rows than are summed at once
    scale = reference(many, many[0], 1e-6)[1]
    return [*found, (many.flip(0).contiguous(), many, many[0], scale, None)]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 8, device=device)
    return [
        ("x: got torch.int64", (x.long(), x[0], 1e-6)),
        (r"weight: got shape \[7\], expected \[8\]", (x, x[0, :7], 1e-6)),
        ("weight: got torch.float16, expected torch.float32", (x, x[0].half(), 1e-6)),
        ("eps: got -1", (x, x[0], -1.0)),
        ("residual: ", (x, x[0], 1e-6, x[0])),
        ("residual: got torch.float16, expected torch.float32", (x, x[0], 1e-6, x.half())),
    ]


def backward_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 8, device=device)
    weight, scale = x[0], x[:, 0].clone()
    return [
        ("grad: (got shape|has)", (x[:1], x, weight, scale)),
        ("grad: got torch.float16", (x.half(), x, weight, scale)),
        ("weight: got", (x, x, weight[:7], scale)),
        ("scale: (got shape|has)", (x, x, weight, x[0].clone())),
        ("scale: got torch.float16", (x, x, weight, scale.half())),
        ("grad_sum: (got shape|has)", (x, x, weight, scale, x[:1])),
    ]


def floor(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> Floor:
    both = 1 if residual is None else 2
    return Floor(both * x.nbytes + weight.nbytes, both * x.nbytes, 4 * x.numel())


def backward_floor(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None = None,
) -> Floor:
    read = 2 if grad_sum is None else 3
    return Floor(read * x.nbytes + weight.nbytes, x.nbytes + weight.nbytes, 8 * x.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        (
            f"2048x4096 {str(dtype)[6:]}",
            (randn(device, dtype, 2048, 4096), randn(device, dtype, 4096), 1e-6, None),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        (label, (x.flip(0).contiguous(), x, weight, reference(x, weight, eps)[1], None))
        for label, (x, weight, eps, _) in benchmarks(device)
    ]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor x, Tensor weight, float eps, Tensor? residual=None) -> "
        "(Tensor, Tensor, Tensor)",
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
        name="rms_norm_backward",
        schema="(Tensor grad, Tensor x, Tensor weight, Tensor scale, Tensor? grad_sum=None) -> "
        "(Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=backward_cases,
        refused=backward_refused,
        floor=backward_floor,
        benchmarks=backward_benchmarks,
    ),
)
