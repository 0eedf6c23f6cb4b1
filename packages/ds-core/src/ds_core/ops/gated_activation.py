"""Gated activations of feed-forward layers. Source: Shazeer 2020 (GLU Variants), section 2."""

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
    expect_together,
    randn,
    unaligned,
    wide,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "gated_activation"
PACKED = "gated_activation_packed"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """`silu(gate) * up`, computed in fp32; silu(v) = v / (1 + e^-v).

    gate, up: `[...]`, alike in shape and dtype, any float dtype; returns the same. Without `up`,
    gate is `[..., 2 f]`, gates and then ups, as one matrix product leaves them, and the result is
    `[..., f]`. Differentiable; the backward keeps nothing but the inputs.
    """
    return _gated(gate, up, "silu")


def geglu(
    gate: torch.Tensor, up: torch.Tensor | None = None, approximate: str = "none"
) -> torch.Tensor:
    """`gelu(gate) * up`, computed in fp32; shapes as of `swiglu`.

    approximate: "none": gelu(v) = v P(X <= v) for normal X, by erf; "tanh": the approximation
    `0.5 v (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3)))`.
    """
    expect(approximate in ("none", "tanh"), "geglu", "approximate", approximate, "'none' or 'tanh'")
    return _gated(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def _gated(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    gate = gate.contiguous()
    result: torch.Tensor = (
        run(PACKED, gate, activation)
        if up is None
        else run(NAME, gate, up.contiguous(), activation)
    )
    return result


def reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`act(gate) * up` with act "silu", "gelu" (by erf) or "gelu_tanh"; all of one shape."""
    _check(gate, up, activation)
    return (activate(wide(gate), activation) * wide(up)).to(gate.dtype)


def backward_reference(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients: of gate `grad * up * act'(gate)`, of up `grad * act(gate)`."""
    _check_backward(grad, gate, up, activation)
    g, v, u = wide(grad), wide(gate), wide(up)
    return (g * u * slope(v, activation)).to(gate.dtype), (g * activate(v, activation)).to(
        gate.dtype
    )


def packed_reference(x: torch.Tensor, activation: str) -> torch.Tensor:
    """As `reference`, of x `[..., 2 f]`: gates, then ups; returns `[..., f]`."""
    _check_packed(x, activation)
    gate, up = x.chunk(2, dim=-1)
    return reference(gate, up, activation)


def packed_backward_reference(grad: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    """As `backward_reference`, of x `[..., 2 f]`; returns the gradient of x."""
    _check_packed_backward(grad, x, activation)
    gate, up = x.chunk(2, dim=-1)
    return torch.cat(backward_reference(grad, gate, up, activation), dim=-1)


def _check(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    expect_float(NAME, "gate", gate)
    expect_like(NAME, "up", up, gate)
    expect_together(NAME, gate, up=up)
    expect(activation in ACTIVATIONS, NAME, "activation", activation, " or ".join(ACTIVATIONS))


def _check_packed(x: torch.Tensor, activation: str) -> None:
    expect_float(PACKED, "x", x)
    even = x.dim() >= 1 and x.shape[-1] % 2 == 0
    expect(even, PACKED, "x", f"shape {list(x.shape)}", "an even last dimension: gates, then ups")
    expect(activation in ACTIVATIONS, PACKED, "activation", activation, " or ".join(ACTIVATIONS))


def _check_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> None:
    _check(gate, up, activation)
    expect_like(NAME, "grad", grad, gate)
    expect_together(NAME, gate, grad=grad)


def _check_packed_backward(grad: torch.Tensor, x: torch.Tensor, activation: str) -> None:
    _check_packed(x, activation)
    expect_shape(PACKED, "grad", grad, (*x.shape[:-1], x.shape[-1] // 2))
    expect(grad.dtype == x.dtype, PACKED, "grad", grad.dtype, x.dtype)
    expect_together(PACKED, x, grad=grad)


def fake(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    _check(gate, up, activation)
    return torch.empty_like(gate)


def backward_fake(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_backward(grad, gate, up, activation)
    return torch.empty_like(gate), torch.empty_like(gate)


def packed_fake(x: torch.Tensor, activation: str) -> torch.Tensor:
    _check_packed(x, activation)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def packed_backward_fake(grad: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    _check_packed_backward(grad, x, activation)
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> Any:
    gate, up = ctx.saved_tensors
    return *call("gated_activation_backward", grad.contiguous(), gate, up, ctx.activation), None


def _packed_backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return call("gated_activation_packed_backward", grad.contiguous(), x, ctx.activation), None


_SHAPES = ((4, 64), (3, 127), (2, 3, 5), (1,), (0, 8))


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Every activation at ordinary, odd, single and empty shapes, unaligned, and far from 0."""
    found: list[tuple[Any, ...]] = [
        (randn(device, dtype, *shape) * 3, randn(device, dtype, *shape, seed=1), activation)
        for shape in _SHAPES
        for activation in ACTIVATIONS
    ]
    gate, up, _ = found[3]
    return [*found, *((unaligned(gate) * 20, unaligned(up), name) for name in ACTIVATIONS)]


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [(randn(device, dtype, *args[0].shape, seed=2), *args) for args in cases(device, dtype)]


def packed_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [
        (randn(device, dtype, *shape[:-1], 2 * shape[-1]), activation)
        for shape in _SHAPES
        for activation in ACTIVATIONS
    ]


def packed_backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [
        (randn(device, dtype, *x.shape[:-1], x.shape[-1] // 2, seed=2), x, activation)
        for x, activation in packed_cases(device, dtype)
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 8, device=device)
    return [
        ("gate: got torch.int64", (x.long(), x.long(), "silu")),
        ("up: ", (x, x[:1].contiguous(), "silu")),
        ("up: got torch.float16, expected torch.float32", (x, x.half(), "silu")),
        ("activation: got '?relu", (x, x, "relu")),
    ]


def packed_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 7, device=device)
    return [
        (r"x: got shape \[2, 7\], expected an even last dimension", (x, "silu")),
        ("activation: got '?relu", (torch.ones(2, 8, device=device), "relu")),
    ]


def backward_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 8, device=device)
    return [
        ("grad: (got shape|has)", (x[:1], x, x, "silu")),
        ("grad: got torch.float16", (x.half(), x, x, "silu")),
        ("up: (got shape|has)", (x, x, x[:1], "silu")),
        ("up: got torch.float16", (x, x, x.half(), "silu")),
    ]


def packed_backward_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x, grad = torch.ones(2, 8, device=device), torch.ones(2, 4, device=device)
    return [
        ("grad: (got shape|has)", (x, x, "silu")),
        ("grad: got torch.float16", (grad.half(), x, "silu")),
    ]


def floor(gate: torch.Tensor, up: torch.Tensor, activation: str) -> Floor:
    return Floor(2 * gate.nbytes, gate.nbytes, 20 * gate.numel())


def backward_floor(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> Floor:
    return Floor(3 * gate.nbytes, 2 * gate.nbytes, 25 * gate.numel())


def packed_floor(x: torch.Tensor, activation: str) -> Floor:
    return Floor(x.nbytes, x.nbytes // 2, 10 * x.numel())


def packed_backward_floor(grad: torch.Tensor, x: torch.Tensor, activation: str) -> Floor:
    return Floor(x.nbytes + grad.nbytes, x.nbytes, 13 * x.numel())


def _benchmarked(device: torch.device) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"2048x11008 {str(dtype)[6:]}", randn(device, dtype, 2048, 11008))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [(label, (x, x.flip(0).contiguous(), "silu")) for label, x in _benchmarked(device)]


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [(label, (args[1].flip(1).contiguous(), *args)) for label, args in benchmarks(device)]


def packed_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [(label, (x.view(1024, -1), "silu")) for label, x in _benchmarked(device)]


def packed_backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        (label, (x[:, : x.shape[1] // 2].contiguous(), x, activation))
        for label, (x, activation) in packed_benchmarks(device)
    ]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor gate, Tensor up, str activation) -> Tensor",
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
        name="gated_activation_backward",
        schema="(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=backward_cases,
        refused=backward_refused,
        floor=backward_floor,
        benchmarks=backward_benchmarks,
    ),
    Op(
        name=PACKED,
        schema="(Tensor x, str activation) -> Tensor",
        reference=packed_reference,
        fake=packed_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=packed_cases,
        refused=packed_refused,
        floor=packed_floor,
        benchmarks=packed_benchmarks,
        autograd=Autograd(_setup, _packed_backward),
    ),
    Op(
        name="gated_activation_packed_backward",
        schema="(Tensor grad, Tensor x, str activation) -> Tensor",
        reference=packed_backward_reference,
        fake=packed_backward_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=packed_backward_cases,
        refused=packed_backward_refused,
        floor=packed_backward_floor,
        benchmarks=packed_backward_benchmarks,
    ),
)
