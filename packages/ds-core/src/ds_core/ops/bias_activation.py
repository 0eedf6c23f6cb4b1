"""A bias and an activation in one pass. Source: Hendrycks and Gimpel 2016 (GELU), section 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_core.ops.activation import activate, slope
from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_like,
    expect_shape,
    expect_tensors,
    expect_together,
    randn,
    unaligned,
    wide,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "bias_activation"
BACKWARD = "bias_activation_backward"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def bias_activation(x: torch.Tensor, bias: torch.Tensor, activation: str = "gelu") -> torch.Tensor:
    """`act(x + bias)`, computed in fp32 in one pass, such as between two linear layers.

    x: `[..., d]`, fp32, bf16 or fp16; bias: `[d]`, x's dtype. activation: "gelu" (by erf),
    "gelu_tanh" (the approximation by tanh), "silu" or "relu". Returns x's shape and dtype.
    Differentiable in x and bias; the backward keeps nothing but the inputs, and sums the gradient
    of the bias in fp32 in a fixed order. Raises OpError for shapes or dtypes that do not fit.
    """
    expect_tensors(NAME, x=x, bias=bias)
    y: torch.Tensor = run(NAME, x.contiguous(), bias.contiguous(), activation)
    return y


def reference(x: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    """`act(x + bias)` with act "silu", "gelu" (by erf), "gelu_tanh" or "relu"."""
    _check(x, bias, activation)
    return activate(wide(x) + wide(bias), activation).to(x.dtype)


def backward_reference(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients: of x `grad * act'(x + bias)`, of bias its sum over rows."""
    _check_backward(grad, x, bias, activation)
    dx = wide(grad) * slope(wide(x) + wide(bias), activation)
    dbias = dx.reshape(-1, x.shape[-1]).sum(0) if x.shape[-1] else wide(bias)
    return dx.to(x.dtype), dbias.to(bias.dtype)


def _check(x: torch.Tensor, bias: torch.Tensor, activation: str) -> None:
    expect_float(NAME, "x", x)
    expect(x.dim() >= 1, NAME, "x", "a scalar", "[..., d]")
    expect_shape(NAME, "bias", bias, x.shape[-1:])
    expect(bias.dtype == x.dtype, NAME, "bias", bias.dtype, x.dtype)
    expect_together(NAME, x, bias=bias)
    expect(activation in ACTIVATIONS, NAME, "activation", activation, " or ".join(ACTIVATIONS))


def _check_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, activation: str
) -> None:
    _check(x, bias, activation)
    expect_like(BACKWARD, "grad", grad, x)
    expect_together(BACKWARD, x, grad=grad)


def fake(x: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    _check(x, bias, activation)
    return torch.empty_like(x)


def backward_fake(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_backward(grad, x, bias, activation)
    return torch.empty_like(x), torch.empty_like(bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> Any:
    return *call(BACKWARD, grad.contiguous(), *ctx.saved_tensors, ctx.activation), None


_SHAPES = ((4, 64), (3, 127), (2, 3, 5), (1,), (0, 8))


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Every activation at ordinary, odd, single and empty shapes, unaligned, and far from 0."""
    found: list[tuple[Any, ...]] = [
        (randn(device, dtype, *shape) * 2, randn(device, dtype, shape[-1], seed=1), activation)
        for shape in _SHAPES
        for activation in ACTIVATIONS
    ]
    x, bias, _ = found[len(ACTIVATIONS)]
    return [*found, *((unaligned(x) * 20, unaligned(bias), name) for name in ACTIVATIONS)]


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """And more rows than one program sums at once."""
    many = (randn(device, dtype, 300, 9), randn(device, dtype, 9), "gelu_tanh")
    return [
        (randn(device, dtype, *args[0].shape, seed=2), *args)
        for args in (*cases(device, dtype), many)
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 8, device=device)
    return [
        ("x: got torch.int64", (x.long(), x[0].long(), "gelu")),
        (r"bias: got shape \[7\], expected \[8\]", (x, x[0, :7].contiguous(), "gelu")),
        ("bias: got torch.float16, expected torch.float32", (x, x[0].half(), "gelu")),
        ("activation: got '?tanh", (x, x[0], "tanh")),
    ]


def backward_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 8, device=device)
    return [
        (r"grad: got shape \[1, 8\], expected \[2, 8\]", (x[:1], x, x[0], "gelu")),
        ("grad: got torch.float16", (x.half(), x, x[0], "gelu")),
    ]


def floor(x: torch.Tensor, bias: torch.Tensor, activation: str) -> Floor:
    return Floor(x.nbytes + bias.nbytes, x.nbytes, 20 * x.numel())


def backward_floor(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, activation: str
) -> Floor:
    return Floor(2 * x.nbytes + bias.nbytes, x.nbytes + bias.nbytes, 25 * x.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(device, dtype, 2048, 4096)
        found.append((f"2048x4096 {str(dtype)[6:]}", (x, x[0].clone(), "gelu_tanh")))
    return found


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [(label, (args[0].flip(0).contiguous(), *args)) for label, args in benchmarks(device)]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor x, Tensor bias, str activation) -> Tensor",
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
        name=BACKWARD,
        schema="(Tensor grad, Tensor x, Tensor bias, str activation) -> (Tensor, Tensor)",
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
