"""A bias and an activation; forward and backward, each in one pass over memory.

Both move 4 (6) bytes an element of bf16 and compute some 20 operations on it: memory-bound. The
forward takes elements as they lie, whatever the width; the backward's programs take a strip of
columns of many rows each, and add up the gradient of the bias of theirs in fp32; the sums of all
programs are then added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import bias_activation as op
from ds_ops.triton_kernels.activations import activated, derivative
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import processors


@triton.jit
def bias_forward(x, bias, y, size, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of `act(x + bias)`, of rows that lie one behind the other."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    near = tl.arange(0, BLOCK)
    mask = near < size - begin
    # One division of 64 bits a program; what is left fits into 32.
    column = ((begin % width).to(tl.int32) + near) % width
    value = tl.load(x + begin + near, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    out = activated(value, ACTIVATION)
    tl.store(y + begin + near, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "groups"])
def bias_backward(
    grad,
    x,
    bias,
    dx,
    sums,
    rows,
    width,
    groups,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of every so many ROWS rows of dx, and their sums: `[groups, width]`."""
    strips = tl.cdiv(width, BLOCK)
    column = tl.program_id(0) % strips * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(0) // strips
    inside = column < width
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(group, tl.cdiv(rows, ROWS), groups):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        # Outside of the tensor 0: a derivative may be NaN where a bias is.
        out = tl.where(mask, g * derivative(value + b, ACTIVATION), 0.0)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
        total += tl.sum(out, axis=0)
    tl.store(sums + group.to(tl.int64) * width + column, total, mask=inside)


# The activation by erf stands for all in a compilation ahead of time: it takes the most.
_ERF = op.ACTIVATIONS.index("gelu")
_FORWARD = Kernel(
    bias_forward,
    (Config({"BLOCK": 1024}),),
    types({"*bf16": "x bias y", "i64:16": "size", "i32:16": "width"}, ACTIVATION=_ERF),
)
_BACKWARD = Kernel(
    bias_backward,
    (Config({"ROWS": 16, "BLOCK": 128}),),
    types(
        {"*bf16": "grad x bias dx", "*fp32": "sums", "i32": "rows groups", "i32:16": "width"},
        ACTIVATION=_ERF,
    ),
)
KERNELS = (_FORWARD, _BACKWARD)


def bias_activation(x: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    """As `ds_core.ops.bias_activation.reference`."""
    y = op.fake(x, bias, activation)
    expect_plain(op.NAME, x=x, bias=bias)
    config = _FORWARD.config(op.NAME, x.device)
    grid = (blocks(x.numel(), config.constants["BLOCK"]),)
    index = op.ACTIVATIONS.index(activation)
    launch(_FORWARD, config, grid, x, bias, y, x.numel(), x.shape[-1], ACTIVATION=index)
    return y


def bias_activation_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.bias_activation.backward_reference`."""
    dx, dbias = op.backward_fake(grad, x, bias, activation)
    expect_plain(op.BACKWARD, grad=grad, x=x, bias=bias)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    config = _BACKWARD.config(op.BACKWARD, x.device)
    strips = blocks(width, config.constants["BLOCK"])
    # Enough programs to keep the device busy, and no more: each writes a row of sums.
    groups = min(
        blocks(rows, config.constants["ROWS"]), blocks(8 * processors(x.device), strips or 1)
    )
    sums = x.new_empty((groups, width), dtype=torch.float32)
    launch(
        *(_BACKWARD, config, (strips * groups,), grad, x, bias, dx, sums, rows, width, groups),
        ACTIVATION=op.ACTIVATIONS.index(activation),
    )
    return dx, sums.sum(0).to(dbias.dtype)
