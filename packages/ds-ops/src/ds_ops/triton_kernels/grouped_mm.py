"""Matrix products per expert, of rows sorted by expert, and the gradient of the experts' matrices.

The host does not know how many rows an expert has. The grid is the most tiles that there can be,
and each program finds its own from the offsets: the rows of each expert, and those behind the last,
are cut into tiles, and a prefix sum over experts tells whose a tile is. Tiles of one expert are
neighbours, and 8 of them read the same columns of b one after the other, while these are in L2.

With many rows per expert the products are what takes the time (2 m k n operations), with few the
matrices, each of which is read once: the tiles for few rows are as low as the instruction allows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import grouped_mm as op
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import MATRIX, TARGETS

#: The most programs that clear one expert's matrix.
_SHARING = 256
#: Tiles of rows that are computed together, column by column.
_TOGETHER = tl.constexpr(8)


@triton.jit
def bounds(offsets, experts, rows, EXPERTS: tl.constexpr):
    """Where the rows of each expert begin and end, and behind them the rest's, up to `rows`.

    Whatever the offsets are, nothing is outside of [0, rows].
    """
    expert = tl.arange(0, EXPERTS)
    begin = tl.load(offsets + expert - 1, mask=(expert > 0) & (expert <= experts), other=0)
    end = tl.load(offsets + expert, mask=expert < experts, other=rows)
    begin = tl.where(expert <= experts, tl.minimum(tl.maximum(begin, 0), rows), rows)
    return begin, tl.maximum(tl.minimum(end, rows), begin)


@triton.jit
def tile_of_rows(offsets, experts, rows, tile, EXPERTS: tl.constexpr, M: tl.constexpr):
    """The expert of a tile of M rows, where the tile begins, and where the expert's rows end.

    Those of the rows behind the last are expert `experts`; a tile that is none begins at its end.
    """
    begin, end = bounds(offsets, experts, rows, EXPERTS)
    tiles = (end - begin + M - 1) // M
    behind = tl.cumsum(tiles, axis=0)
    expert = tl.sum((behind <= tile).to(tl.int32), axis=0)
    own = tl.arange(0, EXPERTS) == expert
    first = tl.sum(tl.where(own, begin + (tile - behind + tiles) * M, 0), axis=0)
    return expert, first, tl.sum(tl.where(own, end, 0), axis=0)


@triton.jit
def place(program, tiles, columns, N: tl.constexpr):
    """The tile of rows and the tile of columns of a program, of `tiles` and of `columns / N`."""
    across = tl.cdiv(columns, N)
    start = program // (_TOGETHER * across) * _TOGETHER
    together = tl.minimum(tiles - start, _TOGETHER)
    within = program % (_TOGETHER * across)
    return start + within % together, within // together


@triton.jit(do_not_specialize=["experts", "rows", "tiles"])
def grouped_product(
    a,
    b,
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
    EXPERTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """M rows of one expert times N columns of its matrix; zeros behind the last expert's rows.

    EXPERTS: a power of two above the number of experts. b_expert, b_row, b_column: strides of b.
    """
    tile, across = place(tl.program_id(0), tiles, columns, N)
    expert, first, end = tile_of_rows(offsets, experts, rows, tile, EXPERTS, M)
    if first < end:
        row = first + tl.arange(0, M)
        column = across * N + tl.arange(0, N)
        inner = tl.arange(0, K)
        left = a + tl.minimum(row, end - 1).to(tl.int64)[:, None] * depth + inner[None, :]
        matrix = b + tl.minimum(expert, experts - 1).to(tl.int64) * b_expert
        right = (
            matrix + inner.to(tl.int64)[:, None] * b_row + column.to(tl.int64)[None, :] * b_column
        )
        inside = (column < columns)[None, :]
        total = tl.zeros((M, N), tl.float32)
        # No step for the rows behind the last.
        for start in range(0, tl.where(expert < experts, depth, 0), K):
            there = start + inner < depth
            x = tl.load(left, mask=there[None, :], other=0.0)
            y = tl.load(right, mask=there[:, None] & inside, other=0.0)
            total = tl.dot(x, y, total, input_precision="ieee")
            left += K
            right += K * b_row
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & inside)


@triton.jit(do_not_specialize=["experts", "rows"])
def grouped_gradient(
    a,
    grad,
    offsets,
    out,
    experts,
    rows,
    depth,
    columns,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """M rows and N columns of the gradient of an expert's matrix: `a_e^T @ grad_e`."""
    down, across = tl.cdiv(depth, M), tl.cdiv(columns, N)
    expert = tl.program_id(0) // (down * across)
    tile = tl.program_id(0) % (down * across)
    row = tile % down * M + tl.arange(0, M)
    column = tile // down * N + tl.arange(0, N)
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), rows)
    end = tl.minimum(tl.load(offsets + expert), rows)
    inner = begin + tl.arange(0, K)
    left = a + inner.to(tl.int64)[None, :] * depth + row[:, None]
    right = grad + inner.to(tl.int64)[:, None] * columns + column[None, :]
    above, inside = (row < depth)[:, None], (column < columns)[None, :]
    step = tl.full((), K, tl.int64)
    total = tl.zeros((M, N), tl.float32)
    for start in range(begin, end, K):
        there = start + tl.arange(0, K) < end
        x = tl.load(left, mask=there[None, :] & above, other=0.0)
        y = tl.load(right, mask=there[:, None] & inside, other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
        left += step * depth
        right += step * columns
    at = (expert.to(tl.int64) * depth + row)[:, None] * columns + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=above & inside)


@triton.jit(do_not_specialize=["experts", "rows"])
def clear_unnamed(
    offsets, out, experts, rows, width, EMPTY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Zeros in those of ROWS rows that are behind the last expert's; mostly none.

    EMPTY: in those of experts without rows; a row is then an expert's matrix. Programs that share
    rows take every so many blocks of them.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if EMPTY:
        begin = tl.load(offsets + row - 1, mask=inside & (row > 0), other=0)
        bare = inside & (tl.load(offsets + row, mask=inside, other=0) <= begin)
    else:
        bare = inside & (row >= tl.load(offsets + experts - 1))
    if tl.sum(bare.to(tl.int32), axis=0) > 0:
        for block in range(tl.program_id(1), tl.cdiv(width, BLOCK), tl.num_programs(1)):
            column = block * BLOCK + tl.arange(0, BLOCK)
            at = row.to(tl.int64)[:, None] * width + column[None, :]
            nothing = tl.zeros((ROWS, BLOCK), out.dtype.element_ty)
            tl.store(out + at, nothing, mask=bare[:, None] & (column < width)[None, :])


def tile(m: int, n: int, k: int, warps: int, stages: int, *names: str, rows: int = 0) -> Config:
    """A config for some targets, and up to so many rows per expert."""
    limits = {"rows": rows} if rows else {}
    return Config({"M": m, "N": n, "K": k}, limits, warps, stages, names)


_HALF = (
    *(tile(16, 64, 64, 4, 4, "sm_80", rows=16), tile(16, 64, 128, 4, 2, "gfx942", rows=16)),
    tile(64, 128, 64, 4, 4, "sm_90", "sm_100", rows=64),
    *(tile(128, 128, 32, 4, 3, "sm_80"), tile(128, 128, 64, 8, 2, "gfx942")),
    *(tile(128, 128, 64, 8, 4, "sm_90"), tile(128, 128, 64, 4, 4, "sm_100")),
)
_SINGLE = (
    tile(64, 64, 16, 4, 3, "sm_80", "sm_90", "sm_100"),
    tile(64, 64, 32, 4, 2, "gfx942"),
)
_HALF_GRADIENT = (
    *(tile(128, 128, 32, 4, 3, "sm_80"), tile(128, 128, 32, 8, 2, "gfx942")),
    *(tile(128, 128, 64, 8, 4, "sm_90"), tile(128, 128, 64, 4, 4, "sm_100")),
)
_SIZES = {"*i32": "offsets", "i32": "experts rows", "i32:16": "depth columns"}
_PRODUCT = _SIZES | {"i32": "experts rows tiles", "i32:16": "depth columns b_expert"}
#: By the stride of b that is 1.
_ALONG: dict[str, dict[str, str | int | bool]] = {
    "": {"b_row": "i32:16", "b_column": 1},
    " turned": {"b_row": 1, "b_column": "i32:16"},
}
_HALVES = [
    Kernel(
        grouped_product,
        _HALF,
        types({"*bf16": "a b out", **_PRODUCT}, EXPERTS=128) | strides,
        *(MATRIX, f"half{name}"),
    )
    for name, strides in _ALONG.items()
]
_WHOLE = Kernel(
    grouped_product,
    _SINGLE,
    types({"*fp32": "a b out", **_PRODUCT}, EXPERTS=128) | _ALONG[""],
    variant="single",
)
_GRADIENT = {
    torch.float32: Kernel(
        grouped_gradient, _SINGLE, types({"*fp32": "a grad out", **_SIZES}), variant="single"
    ),
    torch.bfloat16: Kernel(
        *(grouped_gradient, _HALF_GRADIENT, types({"*bf16": "a grad out", **_SIZES})),
        *(MATRIX, "half"),
    ),
}
#: For numbers that lie other than a multiple of 16 apart: they are loaded one at a time, and larger
#: tiles would have more of them on the way than a thread has registers.
UNEVEN_TILE = tile(64, 64, 32, 8, 2, *TARGETS)
_UNEVEN = Kernel(
    grouped_product,
    (UNEVEN_TILE,),
    types(
        {
            "*bf16": "a b out",
            "*i32": "offsets",
            "i32": "experts rows tiles depth columns b_expert b_row",
        },
        b_column=1,
        EXPERTS=128,
    ),
    variant="uneven",
)
_UNEVEN_GRADIENT = Kernel(
    grouped_gradient,
    (UNEVEN_TILE,),
    types({"*bf16": "a grad out", "*i32": "offsets", "i32": "experts rows depth columns"}),
    variant="uneven",
)
_BEHIND, _EMPTY = (
    Kernel(
        clear_unnamed,
        (Config({"ROWS": rows, "BLOCK": block}),),
        types(
            {"*i32": "offsets", "*bf16": "out", "i32": "experts rows", "i32:16": "width"},
            EMPTY=empty,
        ),
        variant=name,
    )
    for rows, block, empty, name in ((16, 256, False, "behind"), (1, 2048, True, "empty"))
)
KERNELS = (
    *(*_HALVES, _WHOLE, *_GRADIENT.values(), _UNEVEN, _UNEVEN_GRADIENT),
    *(_BEHIND, _EMPTY),
)


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """As `ds_core.ops.grouped_mm.reference`.

    On a GPU, where a look at offsets would wait for the device, those that fall or lie outside make
    results that mean nothing, from memory of a and b alone.
    """
    out = op.fake(a, b, offsets)
    expect_plain(op.NAME, a=a, offsets=offsets)
    if a.device.type == "cpu":
        op.ends(op.NAME, offsets, len(a))
    (rows, depth), (experts, _, columns) = a.shape, b.shape
    if a.dtype == torch.float32:
        kernel = _WHOLE
    else:
        kernel = (
            _HALVES[0] if even(depth, columns, b) else _UNEVEN
        )  # configs of halves are the same
    config = kernel.config(op.NAME, a.device, rows=blocks(rows, experts))
    tiles = most_tiles(rows, experts, config.constants["M"])
    launch(
        *(kernel, config, (tiles * blocks(columns, config.constants["N"]),)),
        *(a, b, offsets, out, experts, rows, depth, columns, tiles, *b.stride()),
        EXPERTS=triton.next_power_of_2(experts + 1),
    )
    return out


def even(depth: int, columns: int, b: torch.Tensor) -> bool:
    """Whether 16 divides all distances between numbers of a product, so that many load at once."""
    return all(size % 16 == 0 for size in (depth, columns, *(s for s in b.stride() if s != 1)))


def most_tiles(rows: int, experts: int, height: int) -> int:
    """The most tiles that rows are in if each is of one expert, or of those behind the last."""
    filled = min(experts + 1, rows)
    return (rows + filled * (height - 1)) // height


def grouped_mm_backward(a: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """As `ds_core.ops.grouped_mm.backward_reference`; offsets are unchecked on a GPU as forward."""
    out = op.backward_fake(a, grad, offsets)
    expect_plain(op.NAME, a=a, grad=grad, offsets=offsets)
    if a.device.type == "cpu":
        op.ends(op.NAME, offsets, len(a))
    experts, depth, columns = out.shape
    if a.dtype == torch.float32:
        kernel = _GRADIENT[torch.float32]
    else:
        kernel = _GRADIENT[torch.bfloat16] if even(depth, columns, grad) else _UNEVEN_GRADIENT
    config = kernel.config(op.NAME, a.device)
    height, width = config.constants["M"], config.constants["N"]
    grid = (experts * blocks(depth, height) * blocks(columns, width),)
    launch(kernel, config, grid, a, grad, offsets, out, experts, len(a), depth, columns)
    return out


def clear_behind(out: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """A contiguous `[rows, width]` with zeros behind the last expert's rows, in place."""
    config = _BEHIND.config(op.NAME, out.device)
    grid = (blocks(len(out), config.constants["ROWS"]), 1)
    sizes = (len(offsets), len(out), out.shape[1])
    launch(_BEHIND, config, grid, offsets, out, *sizes, EMPTY=False)
    return out


def clear_empty(out: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """A contiguous `[experts, k, n]` with zeros for experts without rows, in place."""
    config = _EMPTY.config(op.NAME, out.device)
    experts = len(offsets)
    sizes = (experts, experts, out[0].numel())
    # A matrix is too much for one program: 100 MB, often.
    grid = (experts, min(blocks(sizes[2], config.constants["BLOCK"]), _SHARING))
    launch(_EMPTY, config, grid, offsets, out, *sizes, EMPTY=True)
    return out
