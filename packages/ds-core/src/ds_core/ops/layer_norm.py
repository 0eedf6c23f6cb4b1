"""Layer normalization. Source: Ba, Kiros and Hinton 2016, equations 3 and 4."""

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

NAME = "layer_norm"


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension, computed in fp32.

    x: `[..., d]`, any float dtype; weight and bias: `[d]`, both of x's dtype or both fp32. Returns
    x's shape and dtype. With a residual, like x: `(norm of x + residual, x + residual)`, the sum
    rounded to x's dtype, in one pass. Differentiable in x, weight, bias and residual; gradients of
    weight and bias are summed in fp32. Raises OpError for shapes or dtypes that do not fit.
    """
    y, _, _, total = run(NAME, x.contiguous(), weight, bias, eps, compact(residual))
    return y if residual is None else (y, total)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm; mean and `1 / sqrt(var + eps)` of each row, `[...]`, fp32; the sum.

    The variance is that of the row itself (divided by d, not d - 1). With a residual it is the sum
    that is normalized; without, the sum is empty, `[0]`.
    """
    _check(x, weight, bias, eps, residual)
    total = x.new_empty(0)
    if residual is not None:
        x = total = x + residual
    x32 = wide(x)
    mean = x32.mean(-1, keepdim=True)
    scale = torch.rsqrt((x32 - mean).square().mean(-1, keepdim=True) + eps)
    y = (x32 - mean) * scale * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    return y.to(x.dtype), mean.squeeze(-1), scale.squeeze(-1), total


def backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of what was normalized, weight and bias: with n = (x - mean) * scale and
    g = grad * weight,

    `dx = scale * (g - mean(g) - n * mean(g * n)) + grad_sum`, `dweight = sum over rows of grad * n`
    and `dbias = sum over rows of grad`.
    """
    _check_backward(grad, x, weight, mean, scale, grad_sum)
    wide_grad, scale = wide(grad), scale.unsqueeze(-1)
    normal = (wide(x) - mean.unsqueeze(-1)) * scale
    g = wide_grad * wide(weight)
    inner = (g * normal).mean(-1, keepdim=True)
    dx = scale * (g - g.mean(-1, keepdim=True) - normal * inner)
    if grad_sum is not None:
        dx = dx + wide(grad_sum)
    dweight = (wide_grad * normal).reshape(-1, x.shape[-1]).sum(0)
    dbias = wide_grad.reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> None:
    expect_float(NAME, "x", x)
    expect(x.dim() >= 1, NAME, "x", "a scalar", "[..., d]")
    expect_shape(NAME, "weight", weight, x.shape[-1:])
    allowed = weight.dtype in (x.dtype, torch.float32)
    expect(allowed, NAME, "weight", weight.dtype, f"{x.dtype} or torch.float32")
    expect_together(NAME, x, weight=weight, bias=bias, residual=residual)
    expect(eps >= 0, NAME, "eps", eps, "0 or more")
    if bias is not None:
        expect_like(NAME, "bias", bias, weight)
    if residual is not None:
        expect_like(NAME, "residual", residual, x)


def _check_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None,
) -> None:
    _check(x, weight, None, 0.0)
    expect_like(NAME, "grad", grad, x)
    for name, t in (("mean", mean), ("scale", scale)):
        expect_shape(NAME, name, t, x.shape[:-1])
        expect(t.dtype == wide_dtype(x.dtype), NAME, name, t.dtype, wide_dtype(x.dtype))
    if grad_sum is not None:
        expect_like(NAME, "grad_sum", grad_sum, x)
    expect_together(NAME, x, grad=grad, mean=mean, scale=scale, grad_sum=grad_sum)


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, weight, bias, eps, residual)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    mean, scale = (x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype)) for _ in range(2))
    return torch.empty_like(x), mean, scale, total


def backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_backward(grad, x, weight, mean, scale, grad_sum)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, _, residual = inputs
    _, mean, scale, total = output
    ctx.added, ctx.biased = residual is not None, bias is not None
    ctx.mark_non_differentiable(*([mean, scale] if ctx.added else [mean, scale, total]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.added else x, weight, mean, scale)


def _backward(
    call: Callable[..., Any],
    ctx: Any,
    grad: torch.Tensor | None,
    _mean: Any,
    _scale: Any,
    grad_sum: torch.Tensor | None,
) -> Any:
    x, weight, mean, scale = ctx.saved_tensors
    if grad is None:  # only the sum was used
        return grad_sum, None, None, None, grad_sum
    added = compact(grad_sum) if ctx.added else None
    found = call("layer_norm_backward", grad.contiguous(), x, weight, mean, scale, added)
    dx, dweight, dbias = found
    return dx, dweight, dbias if ctx.biased else None, None, dx if ctx.added else None


_SHAPES = (((4, 16), 64), ((3,), 127), ((2, 5), 1003), ((0,), 8), ((), 33))


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Ordinary, odd and empty shapes; an unaligned view; no bias; a weight in fp32; a residual."""
    found: list[tuple[Any, ...]] = [
        (
            randn(device, dtype, *lead, d),
            randn(device, dtype, d),
            randn(device, dtype, d, seed=1),
            1e-5,
            None,
        )
        for lead, d in _SHAPES
    ]
    x, weight, bias, eps, _ = found[2]
    residual = randn(device, dtype, *x.shape, seed=1)
    return [
        *found,
        (unaligned(x), unaligned(weight), None, eps, None),
        (x, weight.float(), bias.float(), eps, None),
        (x, weight, bias, eps, residual),
    ]


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found = []
    for x, weight, _, eps, residual in cases(device, dtype):
        _, mean, scale, _ = reference(x, weight, None, eps)
        grad = randn(device, dtype, *x.shape, seed=2)
        found.append((grad, x, weight, mean, scale, residual))
    many = randn(device, dtype, 331, 40)  # more rows than are summed at once
    _, mean, scale, _ = reference(many, many[0], None, 1e-5)
    return [*found, (many.flip(0).contiguous(), many, many[0], mean, scale, None)]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 8, device=device)
    return [
        ("x: got torch.int64", (x.long(), x[0], None, 1e-5)),
        (r"weight: got shape \[7\], expected \[8\]", (x, x[0, :7], None, 1e-5)),
        ("weight: got torch.float16, expected torch.float32", (x, x[0].half(), None, 1e-5)),
        ("bias: ", (x, x[0], x[0, :7], 1e-5)),
        ("bias: got torch.float16, expected torch.float32", (x, x[0], x[0].half(), 1e-5)),
        ("eps: got -1", (x, x[0], None, -1.0)),
        ("residual: ", (x, x[0], None, 1e-5, x[0])),
    ]


def backward_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 8, device=device)
    weight, row = x[0], x[:, 0].clone()
    return [
        ("grad: (got shape|has)", (x[:1], x, weight, row, row)),
        ("grad: got torch.float16", (x.half(), x, weight, row, row)),
        ("weight: got", (x, x, weight[:7], row, row)),
        ("mean: (got shape|has)", (x, x, weight, x[0].clone(), row)),
        ("scale: (got shape|has)", (x, x, weight, row, x[0].clone())),
        ("scale: got torch.float16", (x, x, weight, row, row.half())),
        ("grad_sum: (got shape|has)", (x, x, weight, row, row, x[:1])),
    ]


def floor(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> Floor:
    both = 1 if residual is None else 2
    small = weight.nbytes * (1 if bias is None else 2)
    return Floor(both * x.nbytes + small, both * x.nbytes, 7 * x.numel())


def backward_floor(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None = None,
) -> Floor:
    read = 2 if grad_sum is None else 3
    return Floor(read * x.nbytes + weight.nbytes, x.nbytes + 2 * weight.nbytes, 12 * x.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = randn(device, dtype, 2048, 4096), randn(device, dtype, 4096)
        found.append((f"2048x4096 {str(dtype)[6:]}", (x, weight, weight, 1e-5, None)))
    return found


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for label, (x, weight, bias, eps, _) in benchmarks(device):
        _, mean, scale, _ = reference(x, weight, bias, eps)
        found.append((label, (x.flip(0).contiguous(), x, weight, mean, scale, None)))
    return found


OPS = (
    Op(
        name=NAME,
        schema="(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual=None) -> "
        "(Tensor, Tensor, Tensor, Tensor)",
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
        name="layer_norm_backward",
        schema="(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor scale, "
        "Tensor? grad_sum=None) -> (Tensor, Tensor, Tensor)",
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
