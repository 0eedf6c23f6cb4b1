"""Rotary position embedding, into a new tensor or in place; its own backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import rope as op
from ds_core.ops.arguments import expect
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch


@triton.jit(do_not_specialize=["positions", "heads"])
def rotate(
    x,
    cos,
    sin,
    y,
    positions,
    heads,
    width,
    pairs,
    x_batch,
    x_position,
    x_head,
    y_batch,
    y_position,
    y_head,
    table_batch,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    COPIED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """HEADS heads at one position; COPIED: what is not rotated goes to y too.

    Elements of a head lie side by side; other dimensions are as far apart as the arguments say.
    """
    batch = (tl.program_id(0) // positions).to(tl.int64)
    position = (tl.program_id(0) % positions).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    table = batch * table_batch + position * pairs + pair
    c = tl.load(cos + table, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + table, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    there = (head < heads)[:, None]
    source = x + batch * x_batch + position * x_position + head.to(tl.int64)[:, None] * x_head
    target = y + batch * y_batch + position * y_position + head.to(tl.int64)[:, None] * y_head
    kind = y.dtype.element_ty
    if INTERLEAVED:
        element = tl.arange(0, 2 * PAIRS)[None, :]
        mask = there & (element < 2 * pairs)
        both = tl.load(source + element, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (HEADS, PAIRS, 2)))
        both = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (HEADS, 2 * PAIRS))
        tl.store(target + element, both.to(kind), mask=mask)
    else:
        mask = there & (pair < pairs)[None, :]
        a = tl.load(source + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + pairs + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(target + pair[None, :], (a * c - b * s).to(kind), mask=mask)
        tl.store(target + pairs + pair[None, :], (b * c + a * s).to(kind), mask=mask)
    if COPIED:
        for start in range(2 * pairs, width, PAIRS):
            left = there & (start + pair < width)[None, :]
            rest = tl.load(source + start + pair[None, :], mask=left)
            tl.store(target + start + pair[None, :], rest, mask=left)


_CONFIGS = (
    Config({"HEADS": 16, "PAIRS": 16}, {"pairs": 16}, warps=2),
    Config({"HEADS": 16, "PAIRS": 64}, {"pairs": 64}, warps=4),
    Config({"HEADS": 4, "PAIRS": 256}, {"pairs": 256}, warps=4),
)
_TYPES = {
    "*bf16": "x y",
    "*fp32": "cos sin",
    "i32": "positions heads",
    "i32:16": "width pairs x_batch x_position x_head y_batch y_position y_head table_batch",
}
_HALVES, _NEIGHBOURS = (
    Kernel(
        rotate,
        _CONFIGS,
        types(_TYPES, INVERSE=False, COPIED=True, INTERLEAVED=interleaved),
        variant=name,
    )
    for name, interleaved in (("halves", False), ("interleaved", True))
)
KERNELS = (_HALVES, _NEIGHBOURS)


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    """As `ds_core.ops.rope.reference`."""
    y = op.fake(x, cos, sin, heads_first, interleaved, inverse)
    _rotate(op.NAME, x, cos, sin, y, heads_first, interleaved, inverse)
    return y


def rope_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
) -> None:
    """As `ds_core.ops.rope.in_place_reference`."""
    op.in_place_fake(x, cos, sin, heads_first, interleaved, inverse)
    _rotate("rope_", x, cos, sin, x, heads_first, interleaved, inverse)


def _rotate(
    name: str,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    y: torch.Tensor,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
) -> None:
    expect_plain(name, cos=cos, sin=sin)
    expect(x.dtype in op.FLOATS, name, "x", x.dtype, "fp32, bf16 or fp16")
    expect(x.stride(-1) == 1, name, "x", f"strides {list(x.stride())}", "1 for the last dimension")
    _expect_apart(name, y)
    at, head = (2, 1) if heads_first else (1, 2)
    pairs = cos.shape[-1]
    kernel = _NEIGHBOURS if interleaved else _HALVES
    config = kernel.config(name, x.device, pairs=pairs)
    table = cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0
    strides = [t.stride(dim) for t in (x, y) for dim in (0, at, head)]
    launch(
        *(kernel, config),
        (x.shape[0] * x.shape[at], blocks(x.shape[head], config.constants["HEADS"])),
        *(x, cos, sin, y, x.shape[at], x.shape[head], x.shape[3], pairs, *strides, table),
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        COPIED=y is not x,
    )


def _expect_apart(name: str, x: torch.Tensor) -> None:
    """Raise OpError if two elements of what is written may be the same memory."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            apart = stride > reach
            expect(apart, name, "x", f"strides {list(x.stride())}", "rows that do not overlap")
            reach += stride * (size - 1)
