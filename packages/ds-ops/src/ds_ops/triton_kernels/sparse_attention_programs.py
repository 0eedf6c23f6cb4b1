"""What programs of block-sparse attention do with gathered units of tokens.

`sparse_attention.py` says what for, and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_core.ops.block_layout import PART_BITS

LOG2E = tl.constexpr(1.4426950408889634)
_SHIFT = tl.constexpr(PART_BITS)
#: Heads are no wider: their sums would not fit into registers.
MAX_HEAD = 128


@triton.jit
def _work(plan, tiles, heads, layout_heads, pairs):
    """This program's head (of all batches), its tile, where its entries are, and its groups.

    The heavy tiles of all heads come first, then the rest of one head after that of another.
    """
    program = tl.program_id(0)
    heavy = tl.load(plan)
    before = heavy * pairs
    light = tl.maximum(tiles - heavy, 1)
    later = program - before
    rank = tl.where(later < 0, program // pairs, heavy + later % light)
    pair = tl.where(later < 0, program % pairs, later // light)
    own = (pair % heads) % layout_heads * tiles
    count = layout_heads * tiles
    at = own + tl.load(plan + 1 + own + rank)
    begin = tl.load(plan + 1 + count + at)
    full = tl.load(plan + 1 + 2 * count + at)
    groups = tl.load(plan + 1 + 3 * count + at)
    return pair, at - own, plan + 1 + 4 * count + begin, full, groups


@triton.jit
def _gathered(entries, step, UNIT: tl.constexpr, STEP: tl.constexpr):
    """Of a step along a list: where its tokens are, and which parts of the tile see each."""
    place = tl.arange(0, STEP)
    if UNIT >= STEP:
        entry = tl.load(entries + step // (UNIT // STEP))
        first = (entry >> _SHIFT) * UNIT + step % (UNIT // STEP) * STEP
        return first + place, entry + place * 0
    entry = tl.load(entries + step * (STEP // UNIT) + place // UNIT)
    return (entry >> _SHIFT) * UNIT + place % UNIT, entry


@triton.jit
def _rows(base, token, stride, column, there, inside, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """Rows of a tensor, `[tokens, HEAD]`; MASKED: only those that are there, else zeros."""
    at = base + token.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED:
        return tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
    if EXACT:
        return tl.load(at)
    return tl.load(at, mask=inside[None, :], other=0.0)


@triton.jit
def _biased(
    scores,
    query,
    key,
    query_there,
    key_there,
    rpe,
    rpe_row,
    padding,
    mask,
    mask_row,
    RPE: tl.constexpr,
    PADDING: tl.constexpr,
    MASK: tl.constexpr,
):
    """Scores, in powers of 2, with bias and masks; query and key: a column and a row, or turned.

    PADDING, MASK: 0 for no such mask, 1 for one that is added, 2 for one that says what is seen.
    """
    if RPE:
        at = rpe + query.to(tl.int64) * rpe_row + key
        scores += tl.load(at, mask=query_there & key_there, other=0.0).to(tl.float32) * LOG2E
    if PADDING > 0:
        number = tl.load(padding + key, mask=key_there, other=0.0).to(tl.float32)
        if PADDING == 2:
            number = tl.where(number == 0, float("-inf"), 0.0)
        scores += number * LOG2E
    if MASK > 0:
        at = mask + query.to(tl.int64) * mask_row + key
        number = tl.load(at, mask=query_there & key_there, other=0.0).to(tl.float32)
        if MASK == 2:
            number = tl.where(number == 0, float("-inf"), 0.0)
        scores += number * LOG2E
    return scores


@triton.jit
def _hidden(scores, entry, part, query, key, CAUSAL: tl.constexpr):
    """Scores with -inf where the layout, or the order of tokens, hides a key."""
    seen = ((entry >> part) & 1) != 0
    if CAUSAL:
        seen = seen & (key <= query)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _attend(
    peak, total, sums, q, k, v, entries, step, row, there, stride, column, inside, factor,
    rpe, rpe_row, padding, mask, mask_row,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, EXACT: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """A step of keys more: peak and total of the exponentials, sums of the values."""
    key, entry = _gathered(entries, step, UNIT, STEP)
    keys = _rows(k, key, stride, column, there, inside, False, EXACT)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * factor
    scores = _biased(
        scores, row[:, None], key[None, :], there[:, None], (key >= 0)[None, :],
        rpe, rpe_row, padding, mask, mask_row, RPE, PADDING, MASK,
    )  # fmt: skip
    if HIDES:
        part = (tl.arange(0, SIZE) // UNIT)[:, None]
        scores = _hidden(scores, entry[None, :], part, row[:, None], key[None, :], CAUSAL)
    higher = tl.maximum(peak, tl.max(scores, 1))
    # Of a row that sees nothing yet; -inf less itself is no number.
    level = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - level[:, None])
    shrink = tl.exp2(peak - level)
    values = _rows(v, key, stride, column, there, inside, False, EXACT)
    sums = tl.dot(weights.to(v.dtype.element_ty), values, sums * shrink[:, None],
                  input_precision="ieee")  # fmt: skip
    return higher, total * shrink + tl.sum(weights, 1), sums


#: Numbers that no address depends on: one code for all.
PLAIN = ["layout_heads", "tiles", "programs", "heads"]


@triton.jit(do_not_specialize=PLAIN)
def sparse_forward(
    q, k, v, out, lse, plan, rpe, padding, mask,
    tokens, width, heads, layout_heads, tiles, programs,
    stride_batch, stride_head, stride, out_batch, out_head, out_row,
    rpe_batch, rpe_head, rpe_row, padding_batch, mask_row, factor,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, HEAD: tl.constexpr, EXACT: tl.constexpr, SIZE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A tile of queries: `softmax(q k^T * scale + bias) v` and the logarithm of its sum.

    factor: scale / ln 2, for powers of 2 are what GPUs compute.
    """
    pair, tile, entries, full, groups = _work(plan, tiles, heads, layout_heads, programs // tiles)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = batch * stride_batch + head * stride_head
    rpe += batch * rpe_batch + head * rpe_head
    padding += batch * padding_batch
    row = tile * SIZE + tl.arange(0, SIZE)
    there = row < tokens
    column = tl.arange(0, HEAD)
    inside = column < width
    own = _rows(q + first, row, stride, column, there, inside, True, EXACT)
    peak = tl.full((SIZE,), float("-inf"), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    sums = tl.zeros((SIZE, HEAD), tl.float32)
    for step in range(full * (SIZE // STEP)):
        peak, total, sums = _attend(
            peak, total, sums, own, k + first, v + first, entries, step, row, there, stride,
            column, inside, factor, rpe, rpe_row, padding, mask, mask_row,
            RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, False,
        )  # fmt: skip
    if UNIT < SIZE or CAUSAL:
        for step in range(full * (SIZE // STEP), groups * (SIZE // STEP)):
            peak, total, sums = _attend(
                peak, total, sums, own, k + first, v + first, entries, step, row, there, stride,
                column, inside, factor, rpe, rpe_row, padding, mask, mask_row,
                RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, True,
            )  # fmt: skip
    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    at = out + batch * out_batch + head * out_head + row.to(tl.int64)[:, None] * out_row
    tl.store(at + column[None, :], result.to(out.dtype.element_ty),
             mask=there[:, None] & inside[None, :])  # fmt: skip
    told = tl.where(total == 0, float("-inf"), (peak + tl.log2(total)) / LOG2E)
    tl.store(lse + pair.to(tl.int64) * tokens + row, told, mask=there)


@triton.jit
def _query_gradient(
    sums, q, grad, level, delta, k, v, entries, step, row, there, stride, column, inside, factor,
    rpe, rpe_row, padding, mask, mask_row,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, EXACT: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """A step of keys more in the sums of dS k."""
    key, entry = _gathered(entries, step, UNIT, STEP)
    keys = _rows(k, key, stride, column, there, inside, False, EXACT)
    values = _rows(v, key, stride, column, there, inside, False, EXACT)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * factor
    scores = _biased(
        scores, row[:, None], key[None, :], there[:, None], (key >= 0)[None, :],
        rpe, rpe_row, padding, mask, mask_row, RPE, PADDING, MASK,
    )  # fmt: skip
    if HIDES:
        part = (tl.arange(0, SIZE) // UNIT)[:, None]
        scores = _hidden(scores, entry[None, :], part, row[:, None], key[None, :], CAUSAL)
    weights = tl.exp2(scores - level[:, None])
    moved = tl.dot(grad, tl.trans(values), input_precision="ieee") - delta[:, None]
    return tl.dot((weights * moved).to(k.dtype.element_ty), keys, sums, input_precision="ieee")


@triton.jit
def _level(lse, at, there):
    """What to take from scores in powers of 2: the logarithm of the sum; inf for rows without."""
    found = tl.load(lse + at, mask=there, other=float("-inf"))
    return tl.where(found == float("-inf"), float("inf"), found * LOG2E)


@triton.jit(do_not_specialize=PLAIN)
def sparse_backward_queries(
    grad, q, k, v, out, lse, delta, dq, plan, rpe, padding, mask,
    tokens, width, heads, layout_heads, tiles, programs,
    stride_batch, stride_head, stride, out_batch, out_head, out_row,
    rpe_batch, rpe_head, rpe_row, padding_batch, mask_row, factor, scale,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, HEAD: tl.constexpr, EXACT: tl.constexpr, SIZE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A tile of dQ, and of delta, the sums of grad * out that keys and values need."""
    pair, tile, entries, full, groups = _work(plan, tiles, heads, layout_heads, programs // tiles)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = batch * stride_batch + head * stride_head
    second = batch * out_batch + head * out_head
    rpe += batch * rpe_batch + head * rpe_head
    padding += batch * padding_batch
    row = tile * SIZE + tl.arange(0, SIZE)
    there = row < tokens
    column = tl.arange(0, HEAD)
    inside = column < width
    own = _rows(q + first, row, stride, column, there, inside, True, EXACT)
    arrived = _rows(grad + second, row, out_row, column, there, inside, True, EXACT)
    result = _rows(out + second, row, out_row, column, there, inside, True, EXACT)
    inner = tl.sum(arrived.to(tl.float32) * result.to(tl.float32), 1)
    at = pair.to(tl.int64) * tokens + row
    tl.store(delta + at, inner, mask=there)
    level = _level(lse, at, there)
    sums = tl.zeros((SIZE, HEAD), tl.float32)
    for step in range(full * (SIZE // STEP)):
        sums = _query_gradient(
            sums, own, arrived, level, inner, k + first, v + first, entries, step, row, there,
            stride, column, inside, factor, rpe, rpe_row, padding, mask, mask_row,
            RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, False,
        )  # fmt: skip
    if UNIT < SIZE or CAUSAL:
        for step in range(full * (SIZE // STEP), groups * (SIZE // STEP)):
            sums = _query_gradient(
                sums, own, arrived, level, inner, k + first, v + first, entries, step, row, there,
                stride, column, inside, factor, rpe, rpe_row, padding, mask, mask_row,
                RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, True,
            )  # fmt: skip
    to = dq + second + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(to, (sums * scale).to(dq.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def _key_gradients(
    key_sums, value_sums, k, v, q, grad, lse, delta, entries, step, key, there, stride, out_row,
    column, inside, factor, rpe, rpe_row, padding, mask, mask_row,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, EXACT: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """A step of queries more in the sums of dS^T q and P^T grad."""
    row, entry = _gathered(entries, step, UNIT, STEP)
    queries = _rows(q, row, stride, column, there, inside, False, EXACT)
    arrived = _rows(grad, row, out_row, column, there, inside, False, EXACT)
    scores = tl.dot(k, tl.trans(queries), input_precision="ieee") * factor
    scores = _biased(
        scores, row[None, :], key[:, None], (row >= 0)[None, :], there[:, None],
        rpe, rpe_row, padding, mask, mask_row, RPE, PADDING, MASK,
    )  # fmt: skip
    if HIDES:
        part = (tl.arange(0, SIZE) // UNIT)[:, None]
        scores = _hidden(scores, entry[None, :], part, row[None, :], key[:, None], CAUSAL)
    weights = tl.exp2(scores - _level(lse, row, row >= 0)[None, :])
    value_sums = tl.dot(weights.to(grad.dtype.element_ty), arrived, value_sums,
                        input_precision="ieee")  # fmt: skip
    moved = tl.dot(v, tl.trans(arrived), input_precision="ieee") - tl.load(delta + row)[None, :]
    key_sums = tl.dot((weights * moved).to(q.dtype.element_ty), queries, key_sums,
                      input_precision="ieee")  # fmt: skip
    return key_sums, value_sums


@triton.jit(do_not_specialize=PLAIN)
def sparse_backward_keys(
    grad, q, k, v, lse, delta, dk, dv, plan, rpe, padding, mask,
    tokens, width, heads, layout_heads, tiles, programs,
    stride_batch, stride_head, stride, out_batch, out_head, out_row,
    rpe_batch, rpe_head, rpe_row, padding_batch, mask_row, factor, scale,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, HEAD: tl.constexpr, EXACT: tl.constexpr, SIZE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A tile of dK and dV; scores and weights are turned, keys by queries."""
    pair, tile, entries, full, groups = _work(plan, tiles, heads, layout_heads, programs // tiles)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = batch * stride_batch + head * stride_head
    second = batch * out_batch + head * out_head
    rpe += batch * rpe_batch + head * rpe_head
    padding += batch * padding_batch
    lse += pair.to(tl.int64) * tokens
    delta += pair.to(tl.int64) * tokens
    key = tile * SIZE + tl.arange(0, SIZE)
    there = key < tokens
    column = tl.arange(0, HEAD)
    inside = column < width
    keys = _rows(k + first, key, stride, column, there, inside, True, EXACT)
    values = _rows(v + first, key, stride, column, there, inside, True, EXACT)
    key_sums = tl.zeros((SIZE, HEAD), tl.float32)
    value_sums = tl.zeros((SIZE, HEAD), tl.float32)
    for step in range(full * (SIZE // STEP)):
        key_sums, value_sums = _key_gradients(
            key_sums, value_sums, keys, values, q + first, grad + second, lse, delta, entries,
            step, key, there, stride, out_row, column, inside, factor,
            rpe, rpe_row, padding, mask, mask_row,
            RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, False,
        )  # fmt: skip
    if UNIT < SIZE or CAUSAL:
        for step in range(full * (SIZE // STEP), groups * (SIZE // STEP)):
            key_sums, value_sums = _key_gradients(
                key_sums, value_sums, keys, values, q + first, grad + second, lse, delta, entries,
                step, key, there, stride, out_row, column, inside, factor,
                rpe, rpe_row, padding, mask, mask_row,
                RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, True,
            )  # fmt: skip
    to = second + key.to(tl.int64)[:, None] * out_row + column[None, :]
    kept = there[:, None] & inside[None, :]
    tl.store(dk + to, (key_sums * scale).to(dk.dtype.element_ty), mask=kept)
    tl.store(dv + to, value_sums.to(dv.dtype.element_ty), mask=kept)
