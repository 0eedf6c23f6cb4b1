"""Gated activations, gates and ups apart or in one tensor; forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import gated_activation as op
from ds_ops.triton_kernels.activations import gate_of, slope_of
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch


@triton.jit
def gated_forward(
    gate,
    up,
    y,
    width,
    stride,
    up_offset,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of a row of `act(gate) * up`.

    Rows of gate are `stride` elements apart, as are those of up, which begins at `up_offset`.
    """
    parts = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = row * stride + column
    v = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + up_offset + at, mask=mask, other=0.0).to(tl.float32)
    out = v * gate_of(v, ACTIVATION) * u
    tl.store(y + row * width + column, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def gated_backward(
    grad,
    gate,
    up,
    dgate,
    dup,
    width,
    stride,
    up_offset,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of what `gated_forward` reads, laid out as that is."""
    parts = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = row * stride + column
    g = tl.load(grad + row * width + column, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + up_offset + at, mask=mask, other=0.0).to(tl.float32)
    s = gate_of(v, ACTIVATION)
    slope = slope_of(v, s, ACTIVATION)
    tl.store(dgate + at, (g * u * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + up_offset + at, (g * v * s).to(dup.dtype.element_ty), mask=mask)


_CONFIGS = (
    Config({"BLOCK": 256}, {"width": 256}, warps=2),
    Config({"BLOCK": 1024}, warps=4),
)
_SIZES = {"i32:16": "width stride up_offset"}
_FORWARD = [
    Kernel(
        gated_forward,
        _CONFIGS,
        types({"*bf16": "gate up y", **_SIZES}, ACTIVATION=index),
        variant=name,
    )
    for index, name in enumerate(op.ACTIVATIONS)
]
_BACKWARD = [
    Kernel(
        gated_backward,
        _CONFIGS,
        types({"*bf16": "grad gate up dgate dup", **_SIZES}, ACTIVATION=index),
        variant=name,
    )
    for index, name in enumerate(op.ACTIVATIONS)
]
KERNELS = (*_FORWARD, *_BACKWARD)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """As `ds_core.ops.gated_activation.reference`."""
    y = op.fake(gate, up, activation)
    expect_plain(op.NAME, gate=gate, up=up)
    _forward(op.NAME, gate, up, y, (1, gate.numel(), gate.numel(), 0), activation)
    return y


def gated_activation_packed(x: torch.Tensor, activation: str) -> torch.Tensor:
    """As `ds_core.ops.gated_activation.packed_reference`."""
    y = op.packed_fake(x, activation)
    expect_plain(op.PACKED, x=x)
    _forward(op.PACKED, x, x, y, _packed(x), activation)
    return y


def gated_activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.gated_activation.backward_reference`."""
    dgate, dup = op.backward_fake(grad, gate, up, activation)
    expect_plain(op.NAME, grad=grad, gate=gate, up=up)
    sizes = (1, gate.numel(), gate.numel(), 0)
    _backward(op.NAME, grad, gate, up, dgate, dup, sizes, activation)
    return dgate, dup


def gated_activation_packed_backward(
    grad: torch.Tensor, x: torch.Tensor, activation: str
) -> torch.Tensor:
    """As `ds_core.ops.gated_activation.packed_backward_reference`."""
    dx = op.packed_backward_fake(grad, x, activation)
    expect_plain(op.PACKED, grad=grad, x=x)
    _backward(op.PACKED, grad, x, x, dx, dx, _packed(x), activation)
    return dx


def _packed(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows, elements of each half, elements between rows, elements before the ups."""
    width = x.shape[-1] // 2
    return (x.numel() // (2 * width) if width else 0), width, 2 * width, width


def _forward(
    name: str,
    gate: torch.Tensor,
    up: torch.Tensor,
    y: torch.Tensor,
    sizes: tuple[int, int, int, int],
    activation: str,
) -> None:
    index = op.ACTIVATIONS.index(activation)
    config = _FORWARD[index].config(name, gate.device, width=sizes[1])
    grid = (sizes[0] * blocks(sizes[1], config.constants["BLOCK"]),)
    launch(_FORWARD[index], config, grid, gate, up, y, *sizes[1:], ACTIVATION=index)


def _backward(
    name: str,
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    sizes: tuple[int, int, int, int],
    activation: str,
) -> None:
    index = op.ACTIVATIONS.index(activation)
    config = _BACKWARD[index].config(name, grad.device, width=sizes[1])
    grid = (sizes[0] * blocks(sizes[1], config.constants["BLOCK"]),)
    launch(_BACKWARD[index], config, grid, grad, gate, up, dgate, dup, *sizes[1:], ACTIVATION=index)
