"""Root-mean-square normalization. Source: Zhang and Sennrich 2019, equation 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in fp32.

    x: `[..., d]`, any float dtype; weight: `[d]`, x's dtype or fp32. Returns x's shape and dtype.
    Differentiable in x and weight. Raises OpError for shapes or dtypes that do not fit.
    """
    result: torch.Tensor = run(NAME, x, weight, eps)[0]
    return result


def reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rms_norm`, and `1 / sqrt(mean(x^2) + eps)` of each row, `[...]`, fp32."""
    _check(x, weight, eps)
    x32 = wide(x)
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * wide(weight)).to(x.dtype), scale.squeeze(-1)


def backward_reference(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight: with n = x * scale and g = grad * weight,

    `dx = scale * (g - n * mean(g * n))` and `dweight = sum over rows of grad * n`.
    """
    _check(x, weight, 0.0)
    wide_grad, scale = wide(grad), scale.unsqueeze(-1)
    normal = wide(x) * scale
    g = wide_grad * wide(weight)
    dx = scale * (g - normal * (g * normal).mean(-1, keepdim=True))
    dweight = (wide_grad * normal).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    expect_float(NAME, "x", x)
    expect(x.dim() >= 1, NAME, "x", "a scalar", "[..., d]")
    expect_shape(NAME, "weight", weight, x.shape[-1:])
    allowed = weight.dtype in (x.dtype, torch.float32)
    expect(allowed, NAME, "weight", weight.dtype, f"{x.dtype} or torch.float32")
    expect_together(NAME, x, weight=weight)
    expect(eps >= 0, NAME, "eps", eps, "0 or more")


def fake(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight, eps)
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype))


def backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    x, weight, scale = ctx.saved_tensors
    return *call("rms_norm_backward", grad.contiguous(), x, weight, scale), None


_SHAPES = (((4, 16), 64), ((3,), 127), ((2, 5), 1003), ((1,), 1), ((0,), 8), ((), 33))


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Ordinary, odd, single and empty shapes; an unaligned view; a weight in fp32."""
    found = [(randn(device, dtype, *lead, d), randn(device, dtype, d), 1e-6) for lead, d in _SHAPES]
    x, weight, eps = found[1]
    return [*found, (unaligned(x), unaligned(weight), eps), (x, weight.float(), eps)]


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found = []
    for x, weight, eps in cases(device, dtype):
        scale = reference(x, weight, eps)[1]
        found.append((randn(device, dtype, *x.shape).flip(-1).contiguous(), x, weight, scale))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 8, device=device)
    return [
        ("x: got torch.int64", (x.long(), x[0], 1e-6)),
        (r"weight: got shape \[7\], expected \[8\]", (x, x[0, :7], 1e-6)),
        ("weight: got torch.float16, expected torch.float32", (x, x[0].half(), 1e-6)),
        ("eps: got -1", (x, x[0], -1.0)),
    ]


def floor(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> Floor:
    return Floor(x.nbytes + weight.nbytes, x.nbytes, 4 * x.numel())


def backward_floor(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> Floor:
    return Floor(2 * x.nbytes + weight.nbytes, x.nbytes + weight.nbytes, 8 * x.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        (
            f"2048x4096 {str(dtype)[6:]}",
            (randn(device, dtype, 2048, 4096), randn(device, dtype, 4096), 1e-6),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        (label, (x, x, weight, reference(x, weight, eps)[1]))
        for label, (x, weight, eps) in benchmarks(device)
    ]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
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
        schema="(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)",
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
