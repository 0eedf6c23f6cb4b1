"""Biases of convolutions and a sum of two tensors in one pass, in channels-last memory.

Source: the residual blocks of diffusion models: Rombach et al. 2022, appendix E; He et al. 2015,
equation 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_core.ops.arguments import (
    FLOATS,
    compact,
    expect,
    expect_float,
    expect_like,
    expect_shape,
    expect_tensors,
    expect_together,
    randn,
    wide,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "nhwc_bias_add"


def nhwc_bias_add(
    activation: torch.Tensor,
    bias: torch.Tensor,
    other: torch.Tensor | None = None,
    other_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(activation + bias) + (other + other_bias)`, with a bias per channel, computed in fp32.

    activation, other: `[N, C, H, W]`, alike, fp32, bf16 or fp16, in torch.channels_last memory
    (else they are copied so); bias, other_bias: `[C]`, activation's dtype. Without `other` it is
    `activation + bias`; an other_bias needs an `other`. Returns a new `[N, C, H, W]` tensor in
    channels_last memory. Differentiable in all of them; gradients of biases are summed in fp32.
    Raises OpError for shapes or dtypes that do not fit.
    """
    expect_tensors(NAME, activation=activation, bias=bias)
    if activation.dim() == 4:
        activation = activation.contiguous(memory_format=torch.channels_last)
    if other is not None and other.dim() == 4:
        other = other.contiguous(memory_format=torch.channels_last)
    y: torch.Tensor = run(NAME, activation, bias.contiguous(), other, compact(other_bias))
    return y


def reference(
    activation: torch.Tensor,
    bias: torch.Tensor,
    other: torch.Tensor | None = None,
    other_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `nhwc_bias_add`, of tensors that lie in channels_last memory."""
    _check(activation, bias, other, other_bias)
    total = wide(activation) + wide(bias)[:, None, None]
    if other is not None:
        second = wide(other)
        if other_bias is not None:
            second = second + wide(other_bias)[:, None, None]
        total = total + second
    return total.to(activation.dtype).contiguous(memory_format=torch.channels_last)


def _check(
    activation: torch.Tensor,
    bias: torch.Tensor,
    other: torch.Tensor | None,
    other_bias: torch.Tensor | None,
) -> None:
    expect_float(NAME, "activation", activation)
    shape = f"shape {list(activation.shape)}"
    expect(activation.dim() == 4, NAME, "activation", shape, "[N, C, H, W]")
    for name, t in (("activation", activation), ("other", other)):
        if t is not None:
            expect_like(NAME, name, t, activation)
            dense = t.is_contiguous(memory_format=torch.channels_last)
            expect(dense, NAME, name, f"strides {list(t.stride())}", "torch.channels_last memory")
    for name, t in (("bias", bias), ("other_bias", other_bias)):
        if t is not None:
            expect_shape(NAME, name, t, activation.shape[1:2])
            expect(t.dtype == activation.dtype, NAME, name, t.dtype, activation.dtype)
    told = "None, for there is no other"
    expect(other_bias is None or other is not None, NAME, "other_bias", "a tensor", told)
    expect_together(NAME, activation, bias=bias, other=other, other_bias=other_bias)


def fake(
    activation: torch.Tensor,
    bias: torch.Tensor,
    other: torch.Tensor | None = None,
    other_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(activation, bias, other, other_bias)
    return torch.empty_like(activation, memory_format=torch.channels_last)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.given = [t is not None for t in inputs]


def _backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> Any:
    _, _, other, other_bias = ctx.given
    summed = wide(grad).sum((0, 2, 3)).to(grad.dtype)
    return grad, summed, grad if other else None, summed if other_bias else None


#: Of activations; whether there is another tensor, and a bias of it.
_CASES = (
    ((2, 16, 4, 4), True, True),
    ((2, 5, 3, 7), True, False),
    ((1, 33, 1, 6), False, False),
    ((1, 1, 2, 2), True, True),
    ((3, 4, 1, 1), True, True),
    ((0, 4, 2, 2), True, True),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """One to four tensors at ordinary, odd, single and empty sizes."""
    found: list[tuple[Any, ...]] = []
    for shape, second, biased in _CASES:
        x, other = (
            randn(device, dtype, *shape, seed=seed).contiguous(memory_format=torch.channels_last)
            for seed in range(2)
        )
        bias, other_bias = (randn(device, dtype, shape[1], seed=seed) for seed in range(2))
        found.append((x, bias, other if second else None, other_bias if biased else None))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 4, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    bias = x.new_ones(4)
    return [
        ("activation: got torch.int64", (x.long(), bias.long())),
        (r"activation: got shape \[4, 3, 3\]", (x[0], bias)),
        ("activation: got strides", (x.contiguous(), bias)),
        (r"bias: got shape \[3\], expected \[4\]", (x, bias[:3])),
        ("bias: got torch.float16, expected torch.float32", (x, bias.half())),
        ("other: got shape", (x, bias, x[:1])),
        ("other: got strides", (x, bias, x.contiguous())),
        ("other_bias: got a tensor, expected None", (x, bias, None, bias)),
    ]


def floor(
    activation: torch.Tensor,
    bias: torch.Tensor,
    other: torch.Tensor | None = None,
    other_bias: torch.Tensor | None = None,
) -> Floor:
    given = [t for t in (activation, bias, other, other_bias) if t is not None]
    read = sum(t.nbytes for t in given)
    return Floor(read, activation.nbytes, (len(given) - 1) * activation.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(device, dtype, 2, 320, 64, 64).contiguous(memory_format=torch.channels_last)
        bias = randn(device, dtype, 320)
        found.append((f"2x320x64x64 {str(dtype)[6:]}", (x, bias, x.clone(), bias)))
    return found


OPS = (
    Op(
        name=NAME,
        schema="(Tensor activation, Tensor bias, Tensor? other=None, Tensor? other_bias=None) -> "
        "Tensor",
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
)
