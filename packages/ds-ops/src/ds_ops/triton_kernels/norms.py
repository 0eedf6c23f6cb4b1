"""RMS and layer normalization, with a residual that is added before; forward and backward.

One program holds whole rows where they fit into its registers. The backward's programs take many
rows each, and add up the gradients of weight and bias of theirs in fp32; the sums of all programs
are then added in a fixed order, so that a result is the same in every run on a kind of device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import layer_norm as layer
from ds_core.ops import rms_norm as rms
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import processors


@triton.jit
def _summed(x, residual, total, at, mask, ADDED: tl.constexpr, KEPT: tl.constexpr):
    """Elements of x in fp32; ADDED: of x + residual, rounded as x is; KEPT: written to total."""
    value = tl.load(x + at, mask=mask, other=0.0)
    if ADDED:
        other = tl.load(residual + at, mask=mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        if KEPT:
            tl.store(total + at, value, mask=mask)
    return value.to(tl.float32)


@triton.jit
def _scaled(normal, weight, bias, column, inside, BIASED: tl.constexpr):
    """normal * weight + bias."""
    y = normal * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BIASED:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    x,
    weight,
    bias,
    residual,
    y,
    mean,
    scale,
    total,
    rows,
    width,
    eps,
    CENTERED: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """ROWS rows of `(x - mean) * scale * weight + bias`; WHOLE: a row is no longer than BLOCK."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = row.to(tl.int64)[:, None] * width
    there = row < rows
    column = tl.arange(0, BLOCK)
    middle = tl.zeros((ROWS,), tl.float32)
    if WHOLE:
        mask = there[:, None] & (column < width)[None, :]
        value = _summed(x, residual, total, begin + column[None, :], mask, ADDED, True)
        if CENTERED:
            middle = tl.sum(value, axis=1) / width
        value = tl.where(mask, value - middle[:, None], 0.0)
        squares = tl.sum(value * value, axis=1)
    else:
        if CENTERED:
            for start in range(0, width, BLOCK):
                mask = there[:, None] & (start + column < width)[None, :]
                at = begin + start + column[None, :]
                middle += tl.sum(_summed(x, residual, total, at, mask, ADDED, False), axis=1)
            middle = middle / width
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, width, BLOCK):
            mask = there[:, None] & (start + column < width)[None, :]
            at = begin + start + column[None, :]
            part = _summed(x, residual, total, at, mask, ADDED, True) - middle[:, None]
            squares += tl.sum(tl.where(mask, part * part, 0.0), axis=1)
    factor = 1.0 / tl.sqrt_rn(squares / width + eps)
    tl.store(scale + row, factor, mask=there)
    if CENTERED:
        tl.store(mean + row, middle, mask=there)
    if WHOLE:
        out = _scaled(value * factor[:, None], weight, bias, column, column < width, BIASED)
        tl.store(y + begin + column[None, :], out.to(y.dtype.element_ty), mask=mask)
    else:
        for start in range(0, width, BLOCK):
            inside = start + column < width
            mask = there[:, None] & inside[None, :]
            at = begin + start + column[None, :]
            part = _summed(x, residual, total, at, mask, ADDED, False) - middle[:, None]
            out = _scaled(part * factor[:, None], weight, bias, start + column, inside, BIASED)
            tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _incoming(grad, x, weight, begin, column, there, width, middle, factor):
    """Of a block: grad, what was normalized, grad * weight; all fp32, 0 outside of the tensor."""
    mask = there[:, None] & (column < width)[None, :]
    at = begin + column[None, :]
    arrived = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    normal = tl.where(mask, (value - middle[:, None]) * factor[:, None], 0.0)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    return arrived, normal, arrived * w[None, :]


@triton.jit
def _leave(dx, grad_sum, value, begin, column, there, width, ADDED: tl.constexpr):
    """Write a block of dx, with grad_sum added."""
    mask = there[:, None] & (column < width)[None, :]
    at = begin + column[None, :]
    if ADDED:
        value += tl.load(grad_sum + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    grad,
    x,
    weight,
    mean,
    scale,
    grad_sum,
    dx,
    weight_sums,
    bias_sums,
    rows,
    width,
    CENTERED: tl.constexpr,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Every so many ROWS rows of dx, and this program's sums for weight and bias.

    weight_sums, bias_sums: `[programs, width]`, fp32; zeros unless WHOLE.
    """
    column = tl.arange(0, BLOCK)
    own = tl.program_id(0).to(tl.int64) * width
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = row < rows
        begin = row.to(tl.int64)[:, None] * width
        factor = tl.load(scale + row, mask=there, other=0.0)
        middle = tl.zeros((ROWS,), tl.float32)
        if CENTERED:
            middle = tl.load(mean + row, mask=there, other=0.0)
        level = tl.zeros((ROWS,), tl.float32)
        if WHOLE:
            arrived, normal, g = _incoming(
                grad, x, weight, begin, column, there, width, middle, factor
            )
            inner = tl.sum(g * normal, axis=1) / width
            if CENTERED:
                level = tl.sum(g, axis=1) / width
            out = factor[:, None] * (g - level[:, None] - normal * inner[:, None])
            _leave(dx, grad_sum, out, begin, column, there, width, ADDED)
            weight_sum += tl.sum(arrived * normal, axis=0)
            if CENTERED:
                bias_sum += tl.sum(arrived, axis=0)
        else:
            inner = tl.zeros((ROWS,), tl.float32)
            for start in range(0, width, BLOCK):
                arrived, normal, g = _incoming(
                    grad, x, weight, begin, start + column, there, width, middle, factor
                )
                inner += tl.sum(g * normal, axis=1)
                level += tl.sum(g, axis=1)
            inner = inner / width
            level = level / width if CENTERED else tl.zeros((ROWS,), tl.float32)
            for start in range(0, width, BLOCK):
                arrived, normal, g = _incoming(
                    grad, x, weight, begin, start + column, there, width, middle, factor
                )
                out = factor[:, None] * (g - level[:, None] - normal * inner[:, None])
                _leave(dx, grad_sum, out, begin, start + column, there, width, ADDED)
                at, inside = own + start + column, start + column < width
                sums = tl.load(weight_sums + at, mask=inside) + tl.sum(arrived * normal, axis=0)
                tl.store(weight_sums + at, sums, mask=inside)
                if CENTERED:
                    sums = tl.load(bias_sums + at, mask=inside) + tl.sum(arrived, axis=0)
                    tl.store(bias_sums + at, sums, mask=inside)
            tl.debug_barrier()  # what one thread has written here, another may read next
    if WHOLE:
        tl.store(weight_sums + own + column, weight_sum, mask=column < width)
        if CENTERED:
            tl.store(bias_sums + own + column, bias_sum, mask=column < width)


def _whole(rows: int, block: int, warps: int) -> Config:
    return Config({"ROWS": rows, "BLOCK": block, "WHOLE": 1}, {"width": block}, warps)


_LOOP = Config({"ROWS": 1, "BLOCK": 4096, "WHOLE": 0}, warps=16)
_FORWARD = (
    *(_whole(16, 128, 4), _whole(2, 1024, 4), _whole(1, 4096, 8), _whole(1, 8192, 16)),
    _LOOP,
)
_BACKWARD = (
    *(_whole(16, 128, 4), _whole(2, 1024, 8), _whole(1, 4096, 16), _whole(1, 8192, 16)),
    _LOOP,
)

_FORWARD_TYPES = {
    "*bf16": "x weight bias residual y total",
    "*fp32": "mean scale",
    "i32": "rows",
    "i32:16": "width",
    "fp32": "eps",
}
_BACKWARD_TYPES = {
    "*bf16": "grad x weight grad_sum dx",
    "*fp32": "mean scale weight_sums bias_sums",
    "i32": "rows",
    "i32:16": "width",
}
_RMS, _LAYER = (
    Kernel(
        norm_forward,
        _FORWARD,
        types(_FORWARD_TYPES, ADDED=True, CENTERED=centered, BIASED=centered),
        variant=name,
    )
    for name, centered in (("rms", False), ("layer", True))
)
_RMS_BACKWARD, _LAYER_BACKWARD = (
    Kernel(
        norm_backward,
        _BACKWARD,
        types(_BACKWARD_TYPES, ADDED=True, CENTERED=centered),
        variant=name,
    )
    for name, centered in (("rms", False), ("layer", True))
)
KERNELS = (_RMS, _LAYER, _RMS_BACKWARD, _LAYER_BACKWARD)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.rms_norm.reference`."""
    y, scale, total = rms.fake(x, weight, eps, residual)
    _forward(_RMS, rms.NAME, x, weight, None, residual, y, None, scale, total, eps)
    return y, scale, total


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.layer_norm.reference`."""
    y, mean, scale, total = layer.fake(x, weight, bias, eps, residual)
    _forward(_LAYER, layer.NAME, x, weight, bias, residual, y, mean, scale, total, eps)
    return y, mean, scale, total


def _forward(
    kernel: Kernel,
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    mean: torch.Tensor | None,
    scale: torch.Tensor,
    total: torch.Tensor,
    eps: float,
) -> None:
    expect_plain(op, x=x, weight=weight, bias=bias, residual=residual)
    width, rows = x.shape[-1], scale.numel()
    config = kernel.config(op, x.device, width=width)
    launch(
        *(kernel, config, (blocks(rows, config.constants["ROWS"]),)),
        *(x, weight, weight if bias is None else bias, x if residual is None else residual),
        *(y, scale if mean is None else mean, scale, y if residual is None else total),
        *(rows, width, eps),
        CENTERED=mean is not None,
        BIASED=bias is not None,
        ADDED=residual is not None,
    )


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.rms_norm.backward_reference`."""
    dx, _ = rms.backward_fake(grad, x, weight, scale, grad_sum)
    dweight, _ = _backward(
        _RMS_BACKWARD, "rms_norm_backward", grad, x, weight, None, scale, grad_sum, dx
    )
    return dx, dweight


def layer_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.layer_norm.backward_reference`."""
    dx, *_ = layer.backward_fake(grad, x, weight, mean, scale, grad_sum)
    name = "layer_norm_backward"
    return dx, *_backward(_LAYER_BACKWARD, name, grad, x, weight, mean, scale, grad_sum, dx)


def _backward(
    kernel: Kernel,
    op: str,
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor | None,
    scale: torch.Tensor,
    grad_sum: torch.Tensor | None,
    dx: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills dx; returns the gradients of weight and bias."""
    expect_plain(op, grad=grad, x=x, weight=weight, mean=mean, scale=scale, grad_sum=grad_sum)
    width, rows = x.shape[-1], scale.numel()
    config = kernel.config(op, x.device, width=width)
    tiles = blocks(rows, config.constants["ROWS"])
    # While one program of a multiprocessor adds up a row, another one loads.
    programs = min(tiles, processors(x.device) * max(2, 16 // config.warps))
    new = x.new_empty if config.constants["WHOLE"] else x.new_zeros
    sums = new((1 if mean is None else 2, programs, width), dtype=torch.float32)
    launch(
        *(kernel, config, (programs,)),
        *(grad, x, weight, scale if mean is None else mean, scale),
        *(
            x if grad_sum is None else grad_sum,
            dx,
            *(sums.select(0, i) for i in (0, -1)),
            rows,
            width,
        ),
        CENTERED=mean is not None,
        ADDED=grad_sum is not None,
    )
    gradients = sums.sum(1).to(weight.dtype)
    return gradients.select(0, 0), gradients.select(0, -1)
