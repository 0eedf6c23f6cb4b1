"""Attention over batches and packed sequences; forward and backward.

A program of the forward holds a tile of queries and walks over the tiles of keys that they see; of
the backward one kernel walks so for dq, the other holds a tile of keys and walks over the queries
that see them, of all heads that share them. Every sum has one program and one order, so results are
the same in every run. Tiles that no row sees are left out; only those at an edge of what is seen
are masked, in a loop of their own.

The floor is that of the matrix units: a tile of 128 queries needs 4 * 128 * d operations for the
4 * d bytes of a key and value, 128 per byte, about what GPUs have of both. Source: Dao 2023,
section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ds_core.errors import OpError
from ds_core.ops import attention as op
from ds_core.ops.arguments import expect
from ds_ops.triton_kernels.attention_calls import not_taken
from ds_ops.triton_kernels.attention_tiles import (
    LN2,
    LOG2E,
    bounds_of,
    edge_tile,
    is_seen,
    load_rows,
    sequence_of,
    softmax_step,
    tiles_seen,
)
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import MATRIX

#: Stands for no bound of a window.
_FAR = 1 << 30


@triton.jit
def _place(query_starts, key_starts, sequences, queries, keys, BY_KEYS: tl.constexpr,
           PACKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """What a program is for: batch, tile, where its queries begin, their number; the same of keys.

    BY_KEYS: it holds a tile of keys, not of queries.
    """
    tile = tl.program_id(0)
    if PACKED:
        starts = key_starts if BY_KEYS else query_starts
        sequence, first = sequence_of(starts, tile, sequences, BLOCK)
        query_begin, query_count = bounds_of(query_starts, sequence, queries)
        key_begin, key_count = bounds_of(key_starts, sequence, keys)
        return (tile * 0).to(tl.int64), tile - first, query_begin, query_count, key_begin, key_count
    else:
        tiles = tl.cdiv(keys if BY_KEYS else queries, BLOCK)
        zero = tile * 0
        return (tile // tiles).to(tl.int64), tile % tiles, zero, queries, zero, keys


@triton.jit
def _at(base, batch, head, begin, batch_stride, row_stride, head_stride):
    """Where the rows of a head of a sequence begin; strides in eights of elements."""
    at = batch * batch_stride + tl.cast(head, tl.int64) * head_stride
    return base + (at + tl.cast(begin, tl.int64) * row_stride) * 8


@triton.jit
def _leave(base, value, batch, begin, row, count, total, head, heads, inner, width,
           PADDED: tl.constexpr):  # fmt: skip
    """Write rows of a contiguous tensor `[..., total, heads, width]`."""
    at = ((batch * total + begin + row) * heads + head)[:, None] * width + inner[None, :]
    mask = (row < count)[:, None]
    if PADDED:
        mask &= (inner < width)[None, :]
    tl.store(base + at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _forward_step(q, k, v, start, row, column, inner, shift, queries, keys, left, right, k_row,
                  v_row, width, factor, top, total, result, EDGE: tl.constexpr,
                  PADDED: tl.constexpr):  # fmt: skip
    """A tile of keys for a tile of queries."""
    key = load_rows(k, start, k_row, column, inner, keys, width, EDGE, PADDED)
    scores = tl.dot(q, key.trans(), input_precision="ieee") * factor
    if EDGE:
        seen = is_seen(row[:, None], start + column[None, :], shift, keys, left, right)
        scores = tl.where(seen, scores, float("-inf"))
    weights, top, total, result = softmax_step(scores, top, total, result, EDGE)
    value = load_rows(v, start, v_row, column, inner, keys, width, EDGE, PADDED)
    result = tl.dot(weights.to(value.dtype), value, result, input_precision="ieee")
    return top, total, result


#: Numbers that change from call to call: one code for all. Those that addresses depend on, the head
#: size and strides, are in eights of elements, so that addresses are known to be multiples of 16
#: bytes whatever they are.
_STRIDES = "q_batch q_row q_head k_batch k_row k_head v_batch v_row v_head g_batch g_row g_head"
_PLAIN = [
    *("left", "right", "sequences", "queries", "keys", "heads", "group", "eighths"),
    *_STRIDES.split(),
]


@triton.jit(do_not_specialize=_PLAIN)
def attention_forward(
    q,
    k,
    v,
    out,
    lse,
    query_starts,
    key_starts,
    scale,
    left,
    right,
    sequences,
    queries,
    keys,
    heads,
    group,
    eighths,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """`out` and `lse` of M queries of one head.

    queries, keys: of a sequence of the batch, or of all packed ones. group: how many heads share
    keys and values. eighths: of the head size, which D is the next size of tiles to; strides are in
    eights of elements too.
    """
    batch, tile, query_begin, query_count, key_begin, key_count = _place(
        query_starts, key_starts, sequences, queries, keys, False, PACKED, M
    )
    if tile * M >= query_count:
        return
    # The last queries see the most keys: those first, so that no long program is left for the end.
    tile = tl.cdiv(query_count, M) - 1 - tile
    width = eighths * 8
    head = tl.program_id(1)
    q = _at(q, batch, head, query_begin, q_batch, q_row, q_head)
    k = _at(k, batch, head // group, key_begin, k_batch, k_row, k_head)
    v = _at(v, batch, head // group, key_begin, v_batch, v_row, v_head)
    first = tile * M
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    q_tile = load_rows(q, first, q_row, row, inner, query_count, width, True, PADDED)
    shift = key_count - query_count
    last = tl.minimum(first + M, query_count) - 1
    low, inner_low, inner_high, high = tiles_seen(first, last, shift, key_count, left, right, N)
    row += first
    factor = scale * LOG2E
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    result = tl.zeros((M, D), tl.float32)
    for index in range(inner_low, inner_high):
        top, total, result = _forward_step(
            q_tile, k, v, index * N, row, column, inner, shift, query_count, key_count,
            left, right, k_row, v_row, width, factor, top, total, result, False, PADDED,
        )  # fmt: skip
    for index in range(high - low - (inner_high - inner_low)):
        start = edge_tile(index, low, inner_low, inner_high) * N
        top, total, result = _forward_step(
            q_tile, k, v, start, row, column, inner, shift, query_count, key_count,
            left, right, k_row, v_row, width, factor, top, total, result, True, PADDED,
        )  # fmt: skip
    none = total == 0.0
    result = result / tl.where(none, 1.0, total)[:, None]
    logs = tl.where(none, float("-inf"), (top + tl.log2(total)) * LN2)
    at = (batch * heads + head) * queries + query_begin + row
    tl.store(lse + at, logs, mask=row < query_count)
    _leave(out, result, batch, query_begin, row, query_count, queries, head, heads, inner, width,
           PADDED)  # fmt: skip


@triton.jit
def _query_step(q, grad, k, v, start, row, column, inner, shift, queries, keys, left, right, k_row,
                v_row, width, factor, level, delta, result, EDGE: tl.constexpr,
                PADDED: tl.constexpr):  # fmt: skip
    """What a tile of keys adds to the gradient of a tile of queries, without scale."""
    key = load_rows(k, start, k_row, column, inner, keys, width, EDGE, PADDED)
    scores = tl.dot(q, key.trans(), input_precision="ieee") * factor
    weights = tl.exp2(scores - level[:, None])
    if EDGE:
        seen = is_seen(row[:, None], start + column[None, :], shift, keys, left, right)
        weights = tl.where(seen, weights, 0.0)
    value = load_rows(v, start, v_row, column, inner, keys, width, EDGE, PADDED)
    change = tl.dot(grad, value.trans(), input_precision="ieee") - delta[:, None]
    change = (weights * change).to(key.dtype)
    return tl.dot(change, key, result, input_precision="ieee")


@triton.jit(do_not_specialize=_PLAIN)
def attention_backward_queries(
    grad,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    dq,
    delta,
    query_starts,
    key_starts,
    scale,
    left,
    right,
    sequences,
    queries,
    keys,
    heads,
    group,
    eighths,
    g_batch,
    g_row,
    g_head,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    OF_LSE: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """`dq` of M queries of one head, and `delta`, what their rows of `dp` are lowered by.

    OF_LSE: there is a gradient of lse. The other arguments are as those of the forward.
    """
    batch, tile, query_begin, query_count, key_begin, key_count = _place(
        query_starts, key_starts, sequences, queries, keys, False, PACKED, M
    )
    if tile * M >= query_count:
        return
    tile = tl.cdiv(query_count, M) - 1 - tile
    width = eighths * 8
    head = tl.program_id(1)
    first = tile * M
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    there = first + row < query_count
    grad = _at(grad, batch, head, query_begin, g_batch, g_row, g_head)
    g_tile = load_rows(grad, first, g_row, row, inner, query_count, width, True, PADDED)
    tokens = heads * eighths
    out = _at(out, batch * queries, head, query_begin, tokens, tokens, eighths)
    result = load_rows(out, first, tokens, row, inner, query_count, width, True, PADDED)
    lowered = tl.sum(g_tile.to(tl.float32) * result.to(tl.float32), 1)
    at = (batch * heads + head) * queries + query_begin + first + row
    if OF_LSE:
        lowered -= tl.load(grad_lse + at, mask=there, other=0.0)
    tl.store(delta + at, lowered, mask=there)
    level = tl.load(lse + at, mask=there, other=float("inf")) * LOG2E
    q = _at(q, batch, head, query_begin, q_batch, q_row, q_head)
    k = _at(k, batch, head // group, key_begin, k_batch, k_row, k_head)
    v = _at(v, batch, head // group, key_begin, v_batch, v_row, v_head)
    q_tile = load_rows(q, first, q_row, row, inner, query_count, width, True, PADDED)
    shift = key_count - query_count
    last = tl.minimum(first + M, query_count) - 1
    low, inner_low, inner_high, high = tiles_seen(first, last, shift, key_count, left, right, N)
    row += first
    factor = scale * LOG2E
    total = tl.zeros((M, D), tl.float32)
    for index in range(inner_low, inner_high):
        total = _query_step(
            q_tile, g_tile, k, v, index * N, row, column, inner, shift, query_count, key_count,
            left, right, k_row, v_row, width, factor, level, lowered, total, False, PADDED,
        )  # fmt: skip
    for index in range(high - low - (inner_high - inner_low)):
        start = edge_tile(index, low, inner_low, inner_high) * N
        total = _query_step(
            q_tile, g_tile, k, v, start, row, column, inner, shift, query_count, key_count,
            left, right, k_row, v_row, width, factor, level, lowered, total, True, PADDED,
        )  # fmt: skip
    _leave(dq, total * scale, batch, query_begin, row, query_count, queries, head, heads, inner,
           width, PADDED)  # fmt: skip


@triton.jit
def _key_step(q, grad, lse, delta, k, v, start, row, column, inner, shift, queries, keys, left,
              right, q_row, g_row, width, factor, dk, dv, EDGE: tl.constexpr,
              PADDED: tl.constexpr):  # fmt: skip
    """What a tile of queries adds to the gradients of a tile of keys and values."""
    query = load_rows(q, start, q_row, row, inner, queries, width, EDGE, PADDED)
    level = tl.load(lse + start + row, mask=row < queries - start, other=float("inf")) * LOG2E
    scores = tl.dot(k, query.trans(), input_precision="ieee") * factor
    weights = tl.exp2(scores - level[None, :])
    if EDGE:
        seen = is_seen(start + row[None, :], column[:, None], shift, keys, left, right)
        weights = tl.where(seen, weights, 0.0)
    arrived = load_rows(grad, start, g_row, row, inner, queries, width, EDGE, PADDED)
    dv = tl.dot(weights.to(arrived.dtype), arrived, dv, input_precision="ieee")
    lowered = tl.load(delta + start + row, mask=row < queries - start, other=0.0)
    change = tl.dot(v, arrived.trans(), input_precision="ieee") - lowered[None, :]
    change = (weights * change).to(query.dtype)
    dk = tl.dot(change, query, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=_PLAIN)
def attention_backward_keys(
    grad,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    query_starts,
    key_starts,
    scale,
    left,
    right,
    sequences,
    queries,
    keys,
    heads,
    group,
    eighths,
    g_batch,
    g_row,
    g_head,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """`dk` and `dv` of N keys, summed over the heads that share them, one after the other.

    delta: as the kernel of the queries has left it.
    """
    batch, tile, query_begin, query_count, key_begin, key_count = _place(
        query_starts, key_starts, sequences, queries, keys, True, PACKED, N
    )
    if tile * N >= key_count:
        return
    width = eighths * 8
    shared = tl.program_id(1)
    first = tile * N
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    k = _at(k, batch, shared, key_begin, k_batch, k_row, k_head)
    v = _at(v, batch, shared, key_begin, v_batch, v_row, v_head)
    k_tile = load_rows(k, first, k_row, column, inner, key_count, width, True, PADDED)
    v_tile = load_rows(v, first, v_row, column, inner, key_count, width, True, PADDED)
    shift = key_count - query_count
    last = tl.minimum(first + N, key_count) - 1
    # As tiles of keys for queries, with the two sides of the window changed over.
    low, inner_low, inner_high, high = tiles_seen(first, last, -shift, query_count, right, left, M)
    column += first
    factor = scale * LOG2E
    k_sum = tl.zeros((N, D), tl.float32)
    v_sum = tl.zeros((N, D), tl.float32)
    # Of the first head that shares the keys.
    first_head = shared * group
    q = _at(q, batch, first_head, query_begin, q_batch, q_row, q_head)
    grad = _at(grad, batch, first_head, query_begin, g_batch, g_row, g_head)
    at = (batch * heads + first_head) * queries + query_begin
    lse += at
    delta += at
    inner_tiles, edge_tiles = inner_high - inner_low, high - low - (inner_high - inner_low)
    # Loads are begun ahead of a loop even if it has no round: never divide by 0.
    of_inner, of_edge = tl.maximum(inner_tiles, 1), tl.maximum(edge_tiles, 1)
    for index in range(group * inner_tiles):
        head = tl.cast(index // of_inner, tl.int64)
        start = (inner_low + index % of_inner) * M
        k_sum, v_sum = _key_step(
            q + head * q_head * 8, grad + head * g_head * 8,
            lse + head * queries, delta + head * queries,
            k_tile, v_tile, start, row, column, inner, shift, query_count, key_count, left, right,
            q_row, g_row, width, factor, k_sum, v_sum, False, PADDED,
        )  # fmt: skip
    for index in range(group * edge_tiles):
        head = tl.cast(index // of_edge, tl.int64)
        start = edge_tile(index % of_edge, low, inner_low, inner_high) * M
        k_sum, v_sum = _key_step(
            q + head * q_head * 8, grad + head * g_head * 8,
            lse + head * queries, delta + head * queries,
            k_tile, v_tile, start, row, column, inner, shift, query_count, key_count, left, right,
            q_row, g_row, width, factor, k_sum, v_sum, True, PADDED,
        )  # fmt: skip
    kv_heads = heads // group
    _leave(dk, k_sum * scale, batch, key_begin, column, key_count, keys, shared, kv_heads, inner,
           width, PADDED)  # fmt: skip
    _leave(dv, v_sum, batch, key_begin, column, key_count, keys, shared, kv_heads, inner, width,
           PADDED)  # fmt: skip


# --- Configs --------------------------------------------------------------------------------------


def _config(m: int, n: int, d: int, warps: int, stages: int, *targets: str) -> Config:
    return Config({"M": m, "N": n, "D": d}, {"head": d}, warps, stages, targets)


_NVIDIA = ("sm_80", "sm_90", "sm_100")
_NEW = _NVIDIA[1:]
#: Of sm_80: what fits into the 99 KiB of its smaller kin. Of gfx942: four warps have twice the
#: registers that eight have. wgmma and tcgen05 need 64 rows for every four warps.
_FORWARD = (
    _config(128, 64, 64, 8, 3, "sm_80"),
    _config(128, 64, 128, 8, 2, "sm_80"),
    _config(64, 32, 256, 8, 2, "sm_80"),
    _config(128, 128, 64, 8, 3, *_NEW),
    _config(128, 128, 128, 8, 2, "sm_90"),
    _config(128, 64, 128, 8, 3, "sm_100"),
    _config(64, 64, 256, 8, 2, *_NEW),
    _config(128, 64, 64, 4, 1, "gfx942"),
    _config(128, 64, 128, 4, 1, "gfx942"),
    _config(64, 32, 256, 4, 1, "gfx942"),
)
_QUERIES = (
    _config(128, 64, 64, 8, 2, "sm_80"),
    _config(64, 64, 128, 8, 2, "sm_80"),
    _config(64, 32, 256, 8, 1, "sm_80"),
    _config(128, 64, 64, 8, 3, "sm_90"),
    _config(128, 64, 64, 4, 2, "sm_100"),
    _config(128, 64, 128, 8, 2, *_NEW),
    _config(128, 32, 256, 8, 2, *_NEW),
    _config(128, 64, 64, 4, 1, "gfx942"),
    _config(64, 64, 128, 4, 1, "gfx942"),
    _config(64, 32, 256, 4, 1, "gfx942"),
)
_KEYS = (
    _config(64, 64, 64, 8, 2, "sm_80"),
    _config(64, 64, 128, 8, 2, "sm_80"),
    _config(64, 128, 64, 8, 2, *_NEW),
    _config(32, 128, 128, 8, 2, "sm_90"),
    _config(64, 128, 128, 8, 2, "sm_100"),
    _config(64, 64, 64, 4, 1, "gfx942"),
    _config(32, 64, 128, 4, 1, "gfx942"),
)
#: Two sums of 64 keys do not fit into the registers that wgmma adds up in: 32 by mma.sync do.
_WIDE_KEYS = (
    _config(32, 32, 256, 8, 2, "sm_80", "sm_90"),
    _config(32, 64, 256, 8, 2, "sm_100"),
    _config(32, 32, 256, 4, 1, "gfx942"),
)
_TYPES = {
    "*bf16": "q k v out grad dq dk dv",
    "*fp32": "lse grad_lse delta",
    "*i32": "query_starts key_starts",
    "fp32": "scale",
    "i32": " ".join(_PLAIN),
}


def _kernel(
    function: Any, configs: tuple[Config, ...], variant: str = "", sm_90: str = ""
) -> Kernel:
    """Compiled as for packed sequences and a head size that is no power of two: all of its code.

    sm_90: its instruction for products of matrices, if it is not the fastest one.
    """
    named = types(_TYPES, OF_LSE=True, PACKED=True, PADDED=True)
    named = {name: named[name] for name in function.arg_names if name in named}
    instructions = {**MATRIX, "sm_90": sm_90} if sm_90 else MATRIX
    return Kernel(function, configs, named, instructions, variant)


_OF_FORWARD = _kernel(attention_forward, _FORWARD)
_OF_QUERIES = _kernel(attention_backward_queries, _QUERIES)
_OF_KEYS = _kernel(attention_backward_keys, _KEYS)
_OF_WIDE_KEYS = _kernel(attention_backward_keys, _WIDE_KEYS, "wide", "mma.sync")
KERNELS = (_OF_FORWARD, _OF_QUERIES, _OF_KEYS, _OF_WIDE_KEYS)


# --- Launches -------------------------------------------------------------------------------------


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = op.UNBOUNDED,
    max_keys: int = op.UNBOUNDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.attention.reference`."""
    numbers = (scale, left, right, max_queries, max_keys)
    out, lse = op.fake(q, k, v, query_starts, key_starts, *numbers)
    call = _Call(q, k, v, query_starts, key_starts, *numbers)
    config = _OF_FORWARD.config(op.NAME, q.device, head=q.shape[-1])
    grid = (call.tiles(call.queries, config.constants["M"]), q.shape[-2])
    launch(
        _OF_FORWARD,
        config,
        grid,
        *(*call.tensors, out, lse, *call.arguments, *call.strides(*call.tensors)),
        **call.constants(config),
    )
    return out, lse


def attention_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    max_queries: int = op.UNBOUNDED,
    max_keys: int = op.UNBOUNDED,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.attention.backward_reference`."""
    rest = (query_starts, key_starts, scale, left, right, max_queries, max_keys)
    dq, dk, dv = op.backward_fake(grad, grad_lse, q, k, v, out, lse, *rest)
    expect_plain("attention_backward", grad_lse=grad_lse, out=out, lse=lse)
    call = _Call(q, k, v, *rest)
    grad = _near("grad", grad)
    head, strides = q.shape[-1], call.strides(grad, *call.tensors)
    delta = torch.empty_like(lse)
    config = _OF_QUERIES.config("attention_backward", q.device, head=head)
    grid = (call.tiles(call.queries, config.constants["M"]), q.shape[-2])
    launch(
        _OF_QUERIES,
        config,
        grid,
        *(grad, lse if grad_lse is None else grad_lse, *call.tensors, out, lse, dq, delta),
        *(*call.arguments, *strides),
        OF_LSE=grad_lse is not None,
        **call.constants(config),
    )
    of_keys = _OF_KEYS if head <= 128 else _OF_WIDE_KEYS
    config = of_keys.config("attention_backward", q.device, head=head)
    grid = (call.tiles(call.keys, config.constants["N"]), k.shape[-2])
    launch(
        of_keys,
        config,
        grid,
        *(grad, *call.tensors, lse, delta, dk, dv, *call.arguments, *strides),
        **call.constants(config),
    )
    return dq, dk, dv


#: Rows of the largest tile.
_TILE = 128


def _near(name: str, t: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if kernels would not find its rows where they look for them.

    That is at multiples of 8 elements, those of a tile within what 32 bits reach.
    """
    told = f"strides {list(t.stride())}"
    expect(t.stride(-1) == 1, op.NAME, name, told, "a contiguous last dimension")
    steps = zip(t.stride()[:-1], t.shape[:-1], strict=True)
    even = all(stride % 8 == 0 for stride, size in steps if size > 1)
    return t if even and t.stride(-3) * _TILE < 1 << 31 else t.contiguous()


class _Call:
    """What all kernels of a call are told."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        query_starts: torch.Tensor | None,
        key_starts: torch.Tensor | None,
        scale: float,
        left: int,
        right: int,
        max_queries: int,
        max_keys: int,
    ) -> None:
        refusal = not_taken(q)
        if refusal is not None:
            raise OpError(
                f"{op.NAME}: {refusal}; another takes it: DS_OPS_IMPL={op.NAME}=reference"
            )
        self.tensors = tuple(_near(name, t) for name, t in (("q", q), ("k", k), ("v", v)))
        if q.device.type == "cpu":  # a GPU would have to be waited for
            op.check_starts(q, k, query_starts, key_starts, max_queries, max_keys)
        self.queries, self.keys, self._head = q.shape[-3], k.shape[-3], q.shape[-1]
        self._packed = query_starts is not None
        self._sequences = len(q) if query_starts is None else len(query_starts) - 1
        unused = k if query_starts is None else query_starts
        left, right = (_FAR if side == op.UNBOUNDED else min(side, _FAR) for side in (left, right))
        self.arguments = (
            *(unused, unused if key_starts is None else key_starts, scale, left, right),
            *(self._sequences, self.queries, self.keys, q.shape[-2]),
            *(q.shape[-2] // k.shape[-2], self._head // 8),
        )

    def tiles(self, tokens: int, block: int) -> int:
        """How many programs hold the tokens of all sequences, in tiles of `block`."""
        if not self._packed:
            return self._sequences * blocks(tokens, block)
        return tokens // block + self._sequences if tokens else 0

    def constants(self, config: Config) -> dict[str, bool]:
        """How tensors lie, as the kernels' constants."""
        return {"PACKED": self._packed, "PADDED": self._head != config.constants["D"]}

    def strides(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        """From one sequence of a batch, row and head to the next, of each tensor, in eights."""
        found: list[int] = []
        for t in tensors:
            steps = [stride // 8 for stride in t.stride()[:-1]]
            found += [0, *steps] if self._packed else steps
        return tuple(found)
