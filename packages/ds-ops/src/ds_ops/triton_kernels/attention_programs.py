"""What programs of attention do: a tile of queries over keys, and of keys over queries.

`attention.py` says what for, and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
STRIDES = "q_batch q_row q_head k_batch k_row k_head v_batch v_row v_head g_batch g_row g_head"
PLAIN = [
    *("left", "right", "sequences", "queries", "keys", "heads", "group", "eighths"),
    *STRIDES.split(),
]


@triton.jit(do_not_specialize=PLAIN)
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


@triton.jit(do_not_specialize=PLAIN)
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


@triton.jit(do_not_specialize=PLAIN)
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
