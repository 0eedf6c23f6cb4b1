"""Products of fp8 matrices with scales of rows and columns: one per expert, or one.

Where the multiplier takes float8_e4m3fn (sm_90, sm_100), numbers go to it as they are. That of
gfx942 takes float8_e4m3fnuz, in which the same bits are half the number, but for zero and NaN.
Elsewhere, also on gfx942's kin, numbers are widened in registers by moving bits, to fp16, which has
all of them. Half the bytes of bf16 are read in any case, which is what counts with few rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ds_core.ops import grouped_mm_fp8 as grouped
from ds_core.ops import scaled_mm as scaled
from ds_core.ops.grouped_mm import ends
from ds_ops.triton_kernels import targets
from ds_ops.triton_kernels.grouped_mm import UNEVEN_TILE, even, most_tiles, place, tile_of_rows
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import MATRIX

#: How numbers go to the multiplier.
_WIDENED, _SAME, _HALVED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def halved(bits):
    """The bits in float8_e4m3fnuz of half the numbers that they are in float8_e4m3fn.

    It has one zero, and NaN where the other has -0. Without comparisons, of which a tile has more
    than there are registers for their results.
    """
    wide = bits.to(tl.int16)
    magnitude = wide & 0x7F
    is_nan = (magnitude + 1) >> 7
    is_some = (magnitude + 0x7F) >> 7
    sign = ((wide & 0x80) | (is_nan << 7)) & -is_some
    return ((magnitude & (is_nan - 1)) | sign).to(tl.uint8)


@triton.jit
def widened(bits):
    """The numbers of float8_e4m3fn as fp16: the exponent's bias is 8 more, NaN has all its bits."""
    wide = bits.to(tl.int16)
    magnitude = wide & 0x7F
    is_nan = (magnitude + 1) >> 7
    found = (magnitude << 7) | ((wide & 0x80) << 8) | (is_nan * 0x7C00)
    return found.to(tl.float16, bitcast=True) * 256.0


@triton.jit(do_not_specialize=["experts", "rows", "tiles"])
def fp8_product(
    a,
    b,
    scale_a,
    scale_b,
    bias,
    offsets,
    out,
    experts,
    rows,
    depth,
    columns,
    tiles,
    b_expert,
    b_row,
    b_column,
    BIASED: tl.constexpr,
    EXPERTS: tl.constexpr,
    NUMBERS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """As `grouped_product`, of the bits of fp8 numbers, times the scales of rows and columns.

    NUMBERS: how they go to the multiplier.
    """
    tile, across = place(tl.program_id(0), tiles, columns, N)
    expert, first, end = tile_of_rows(offsets, experts, rows, tile, EXPERTS, M)
    if first < end:
        row = first + tl.arange(0, M)
        column = across * N + tl.arange(0, N)
        inner = tl.arange(0, K)
        own = tl.minimum(expert, experts - 1).to(tl.int64)
        left = a + tl.minimum(row, end - 1).to(tl.int64)[:, None] * depth + inner[None, :]
        right = b + own * b_expert + inner.to(tl.int64)[:, None] * b_row
        right += column.to(tl.int64)[None, :] * b_column
        inside = column < columns
        total = tl.zeros((M, N), tl.float32)
        # No step for the rows behind the last.
        for start in range(0, tl.where(expert < experts, depth, 0), K):
            there = start + inner < depth
            x = tl.load(left, mask=there[None, :], other=0)
            y = tl.load(right, mask=there[:, None] & inside[None, :], other=0)
            if NUMBERS == _SAME:
                x = x.to(tl.float8e4nv, bitcast=True)
                y = y.to(tl.float8e4nv, bitcast=True)
                # The multiplier's own sums have fewer bits than fp32: not more than K of them.
                total = tl.dot(x, y, total, max_num_imprecise_acc=K)
            elif NUMBERS == _HALVED:
                x = halved(x).to(tl.float8e4b8, bitcast=True)
                y = halved(y).to(tl.float8e4b8, bitcast=True)
                total = tl.dot(x, y, total)
            else:
                total = tl.dot(widened(x), widened(y), total)
            left += K
            right += K * b_row
        if NUMBERS == _HALVED:
            total *= 4.0
        mask = (row < end)[:, None] & inside[None, :]
        total *= tl.load(scale_a + row, mask=row < end, other=0.0)[:, None]
        scale = tl.load(scale_b + own * columns + column, mask=inside, other=0.0)
        total *= scale[None, :]
        if BIASED:
            total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        # Behind the last nothing was added up, whatever the scales.
        total = tl.where(expert < experts, total, 0.0)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def _tile(
    m: int, k: int, warps: int, stages: int, *names: str, numbers: int = 0, **limits: int
) -> Config:
    constants = {"M": m, "N": 128, "K": k, "NUMBERS": numbers}
    return Config(constants, limits, warps, stages, names)


_CONFIGS = (
    *(_tile(16, 64, 4, 3, "sm_80", rows=16), _tile(64, 64, 8, 3, "sm_80")),
    *(_tile(64, 128, 4, 3, "sm_90", "sm_100", numbers=1, rows=64),),
    *(_tile(128, 128, 8, 3, "sm_90", numbers=1), _tile(128, 128, 4, 3, "sm_100", numbers=1)),
    *(_tile(16, 128, 4, 2, "gfx942", numbers=2, rows=16, kin=0),),
    *(_tile(128, 64, 8, 2, "gfx942", numbers=2, kin=0),),
    *(_tile(64, 64, 4, 2, "gfx942"),),
)
_TYPES = types(
    {
        "*u8": "a b",
        "*fp32": "scale_a scale_b",
        "*bf16": "bias out",
        "*i32": "offsets",
        "i32": "experts rows tiles",
        "i32:16": "depth columns b_expert",
    },
    EXPERTS=128,
    BIASED=False,
)
#: By the stride of b that is 1.
_TURNED: dict[str, str | int | bool] = {"b_row": 1, "b_column": "i32:16"}
_AS_ROWS: dict[str, str | int | bool] = {"b_row": "i32:16", "b_column": 1}
PRODUCT, _OF_ROWS = (
    Kernel(fp8_product, _CONFIGS, _TYPES | strides, MATRIX, name)
    for name, strides in (("turned", _TURNED), ("by rows", _AS_ROWS))
)
#: As that of `grouped_mm`.
_UNEVEN = Kernel(
    fp8_product,
    (replace(UNEVEN_TILE, constants={**UNEVEN_TILE.constants, "NUMBERS": 0}),),
    {
        name: each.removesuffix(":16") if isinstance(each, str) else each
        for name, each in PRODUCT.types.items()
    },
    variant="uneven",
)
KERNELS = (PRODUCT, _OF_ROWS, _UNEVEN)


def grouped_mm_fp8(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As `ds_core.ops.grouped_mm_fp8.reference`.

    On a GPU, where a look at offsets would wait for the device, those that fall or lie outside make
    results that mean nothing, from memory of the arguments alone.
    """
    out = grouped.fake(a, b, scale_a, scale_b, offsets, out_dtype)
    if a.device.type == "cpu":
        ends(grouped.NAME, offsets, len(a))
    _launch(grouped.NAME, a, b, scale_a, scale_b, None, offsets, out)
    return out


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As `ds_core.ops.scaled_mm.reference`: by one expert."""
    out = scaled.fake(a, b, scale_a, scale_b, bias, out_dtype)
    scale_a = scale_a.expand(len(a)).contiguous()
    scale_b = scale_b.expand(b.shape[1]).contiguous()
    offsets = torch.full((1,), len(a), dtype=torch.int32, device=a.device)
    _launch(scaled.NAME, a, b.unsqueeze(0), scale_a, scale_b, bias, offsets, out)
    return out


def is_kin(device: torch.device) -> bool:
    """Whether a device is not itself the target whose configs it runs."""
    return targets.architecture(device.type, device.index) not in targets.TARGETS


def _launch(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    out: torch.Tensor,
) -> None:
    bits = a.view(torch.uint8)
    expect_plain(name, a=bits, scale_a=scale_a, scale_b=scale_b, bias=bias, offsets=offsets)
    (rows, depth), (experts, _, columns) = a.shape, b.shape
    kernel = PRODUCT if even(depth, columns, b) else _UNEVEN
    config = kernel.config(name, a.device, rows=blocks(rows, experts), kin=is_kin(a.device))
    tiles = most_tiles(rows, experts, config.constants["M"])
    launch(
        *(kernel, config, (tiles * blocks(columns, config.constants["N"]),)),
        *(bits, b.view(torch.uint8), scale_a, scale_b, out if bias is None else bias, offsets),
        *(out, experts, rows, depth, columns, tiles, *b.stride()),
        BIASED=bias is not None,
        EXPERTS=triton.next_power_of_2(experts + 1),
    )
