"""What programs of evoformer attention do with their tiles.

`evoformer_attention.py` says what for, and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Exponentials are of base 2, as the hardware's: scores are multiplied by log2(e).
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(base, row, rows, stride, column, width):
    """Rows of q, k, v or of what is like them; 0 from `rows` on."""
    mask = (row < rows)[:, None] & (column < width)[None, :]
    return tl.load(base + (row[:, None] * stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _put(base, value, row, rows, stride, column, width):
    """Write rows that `_tile` would read."""
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * stride + column[None, :]
    tl.store(base + at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _biased(
    scores,
    bias1,
    bias2,
    query,
    key,
    queries,
    keys,
    length,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Scores with the biases, times log2(e); -inf from key `keys` on.

    query and key: places in the tile, `[n, 1]` and `[1, m]`, whichever way it lies; the biases
    begin where it does.
    """
    scores = scores * _LOG2E
    if FIRST:
        scores += tl.load(bias1 + key, mask=key < keys, other=0.0).to(tl.float32) * _LOG2E
    if SECOND:
        inside = (query < queries) & (key < keys)
        pairs = tl.load(bias2 + (query * length + key), mask=inside, other=0.0)
        scores += pairs.to(tl.float32) * _LOG2E
    return tl.where(key < keys, scores, float("-inf"))


@triton.jit
def _sums(lse, row, rows):
    """The logarithms to base 2 of rows' sums; 0 for one whose keys are all at -inf.

    Infinity from `rows` on, whose weights then are 0 however large a key's bias is.
    """
    value = tl.load(lse + row, mask=row < rows, other=float("inf")) * _LOG2E
    return tl.where(value == float("-inf"), 0.0, value)


#: Numbers of alignments and heads, which change from call to call: one code for all.
_PLAIN = ["sequences", "heads", "batches", "together"]


@triton.jit(do_not_specialize=_PLAIN)
def evoformer_forward(
    q,
    k,
    v,
    bias1,
    bias2,
    out,
    lse,
    sequences,
    length,
    heads,
    width,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS queries of one head of one sequence."""
    tiles = tl.cdiv(length, ROWS)
    tile = tl.program_id(0) % tiles
    place = (tl.program_id(0) // tiles).to(tl.int64)
    sequence, head = place % sequences, place // sequences % heads
    batch = place // sequences // heads
    row, key, column = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    stride, first = heads * width, tile.to(tl.int64) * ROWS
    rows = length - tile * ROWS
    begin = ((batch * sequences + sequence) * length * heads + head) * width
    k += begin
    v += begin
    bias1 += (batch * sequences + sequence) * length
    bias2 += ((batch * heads + head) * length + first) * length
    queries = _tile(q + begin + first * stride, row, rows, stride, column, width)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, length, KEYS):
        left = length - start
        keys = _tile(k, key, left, stride, column, width)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        s = _biased(s, bias1, bias2, row[:, None], key[None, :], rows, left, length, FIRST, SECOND)
        higher = tl.maximum(top, tl.max(s, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(p, axis=1)
        values = _tile(v, key, left, stride, column, width)
        mixed = tl.dot(p.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
        top = higher
        k += KEYS * stride
        v += KEYS * stride
        bias1 += KEYS
        bias2 += KEYS
    dead = total == 0.0
    mixed = mixed / tl.where(dead, 1.0, total)[:, None]
    _put(out + begin + first * stride, mixed, row, rows, stride, column, width)
    logarithm = tl.where(dead, float("-inf"), top * _LN2 + tl.log(total))
    own = ((batch * sequences + sequence) * heads + head) * length + first
    tl.store(lse + own + row, logarithm, mask=row < rows)


@triton.jit(do_not_specialize=_PLAIN)
def evoformer_dq(
    grad,
    q,
    k,
    v,
    bias1,
    bias2,
    out,
    lse,
    level,
    dq,
    sequences,
    length,
    heads,
    width,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS rows of dq, and their rowsum(grad * out), laid out as lse, for the other kernels."""
    tiles = tl.cdiv(length, ROWS)
    tile = tl.program_id(0) % tiles
    place = (tl.program_id(0) // tiles).to(tl.int64)
    sequence, head = place % sequences, place // sequences % heads
    batch = place // sequences // heads
    row, key, column = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    stride, first = heads * width, tile.to(tl.int64) * ROWS
    rows = length - tile * ROWS
    begin = ((batch * sequences + sequence) * length * heads + head) * width
    own = ((batch * sequences + sequence) * heads + head) * length + first
    k += begin
    v += begin
    begin += first * stride
    bias1 += (batch * sequences + sequence) * length
    bias2 += ((batch * heads + head) * length + first) * length
    arrived = _tile(grad + begin, row, rows, stride, column, width)
    results = _tile(out + begin, row, rows, stride, column, width)
    middle = tl.sum(arrived.to(tl.float32) * results.to(tl.float32), axis=1)
    tl.store(level + own + row, middle, mask=row < rows)
    queries = _tile(q + begin, row, rows, stride, column, width)
    sums = _sums(lse + own, row, rows)
    slope = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, length, KEYS):
        left = length - start
        keys = _tile(k, key, left, stride, column, width)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        s = _biased(s, bias1, bias2, row[:, None], key[None, :], rows, left, length, FIRST, SECOND)
        p = tl.exp2(s - sums[:, None])
        values = _tile(v, key, left, stride, column, width)
        ds = p * (tl.dot(arrived, tl.trans(values), input_precision="ieee") - middle[:, None])
        slope = tl.dot(ds.to(keys.dtype), keys, slope, input_precision="ieee")
        k += KEYS * stride
        v += KEYS * stride
        bias1 += KEYS
        bias2 += KEYS
    _put(dq + begin, slope * scale, row, rows, stride, column, width)


@triton.jit(do_not_specialize=_PLAIN)
def evoformer_dkv(
    grad,
    q,
    k,
    v,
    bias1,
    bias2,
    lse,
    level,
    dk,
    dv,
    dbias1,
    sequences,
    length,
    heads,
    width,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WANTED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """KEYS rows of dk and dv; WANTED: and this head's part of dbias1, laid out as lse.

    The tile of scores lies with the keys first, as the products that follow need it.
    """
    tiles = tl.cdiv(length, KEYS)
    tile = tl.program_id(0) % tiles
    place = (tl.program_id(0) // tiles).to(tl.int64)
    sequence, head = place % sequences, place // sequences % heads
    batch = place // sequences // heads
    row, key, column = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    stride, first = heads * width, tile.to(tl.int64) * KEYS
    there = length - tile * KEYS
    begin = ((batch * sequences + sequence) * length * heads + head) * width
    own = ((batch * sequences + sequence) * heads + head) * length
    q += begin
    grad += begin
    lse += own
    level += own
    begin += first * stride
    bias1 += (batch * sequences + sequence) * length + first
    bias2 += (batch * heads + head) * length * length + first
    keys = _tile(k + begin, key, there, stride, column, width)
    values = _tile(v + begin, key, there, stride, column, width)
    key_slope = tl.zeros((KEYS, WIDTH), tl.float32)
    value_slope = tl.zeros((KEYS, WIDTH), tl.float32)
    bias_slope = tl.zeros((KEYS,), tl.float32)
    for start in range(0, length, ROWS):
        left = length - start
        queries = _tile(q, row, left, stride, column, width)
        arrived = _tile(grad, row, left, stride, column, width)
        s = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
        s = _biased(s, bias1, bias2, row[None, :], key[:, None], left, there, length, FIRST, SECOND)
        p = tl.exp2(s - _sums(lse, row, left)[None, :])
        value_slope = tl.dot(p.to(arrived.dtype), arrived, value_slope, input_precision="ieee")
        middle = tl.load(level + row, mask=row < left, other=0.0)
        ds = p * (tl.dot(values, tl.trans(arrived), input_precision="ieee") - middle[None, :])
        key_slope = tl.dot(ds.to(queries.dtype), queries, key_slope, input_precision="ieee")
        if WANTED:
            bias_slope += tl.sum(ds, axis=1)
        q += ROWS * stride
        grad += ROWS * stride
        lse += ROWS
        level += ROWS
        bias2 += ROWS * length
    _put(dk + begin, key_slope * scale, key, there, stride, column, width)
    _put(dv + begin, value_slope, key, there, stride, column, width)
    if WANTED:
        tl.store(dbias1 + own + first + key, bias_slope, mask=key < there)


@triton.jit(do_not_specialize=_PLAIN)
def evoformer_dbias2(
    grad,
    q,
    k,
    v,
    bias1,
    bias2,
    lse,
    level,
    dbias2,
    batches,
    sequences,
    together,
    length,
    heads,
    width,
    scale,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tile of bias2's gradient, summed over `together` sequences.

    dbias2: `[parts, batch, heads, length, length]`, of the sequences from part * together on.
    """
    across, down = tl.cdiv(length, KEYS), tl.cdiv(length, ROWS)
    tile = tl.program_id(0) % (across * down)
    place = (tl.program_id(0) // (across * down)).to(tl.int64)
    head, batch, part = place % heads, place // heads % batches, place // heads // batches
    row, key, column = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    stride = heads * width
    first_row, first_key = tile // across * ROWS, tile % across * KEYS
    rows, keys_left = length - first_row, length - first_key
    inside = (row < rows)[:, None] & (key < keys_left)[None, :]
    at = first_row.to(tl.int64) * length + first_key
    near = row[:, None] * length + key[None, :]
    pairs = tl.load(
        bias2 + (batch * heads + head) * length * length + at + near, mask=inside, other=0.0
    )
    begin = (batch * sequences + part * together) * length
    bias1 += begin + first_key
    own = begin * heads + head * length + first_row
    lse += own
    level += own
    begin = (begin * heads + head) * width
    from_row = begin + first_row.to(tl.int64) * stride
    from_key = begin + first_key.to(tl.int64) * stride
    q += from_row
    grad += from_row
    k += from_key
    v += from_key
    slope = tl.zeros((ROWS, KEYS), tl.float32)
    for _ in range(tl.minimum(together, sequences - part * together)):
        queries = _tile(q, row, rows, stride, column, width)
        keys = _tile(k, key, keys_left, stride, column, width)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        s += pairs.to(tl.float32)
        s = _biased(
            s, bias1, bias2, row[:, None], key[None, :], rows, keys_left, length, FIRST, False
        )
        p = tl.exp2(s - _sums(lse, row, rows)[:, None])
        arrived = _tile(grad, row, rows, stride, column, width)
        values = _tile(v, key, keys_left, stride, column, width)
        middle = tl.load(level + row, mask=row < rows, other=0.0)
        slope += p * (tl.dot(arrived, tl.trans(values), input_precision="ieee") - middle[:, None])
        q += length * stride
        k += length * stride
        v += length * stride
        grad += length * stride
        bias1 += length
        lse += length * heads
        level += length * heads
    target = dbias2 + ((part * batches + batch) * heads + head) * length * length + at
    tl.store(target + near, slope.to(dbias2.dtype.element_ty), mask=inside)
