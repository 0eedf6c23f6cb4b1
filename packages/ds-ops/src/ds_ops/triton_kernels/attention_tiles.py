"""Tiles of attention: which sequence is whose, rows of keys, and one step of softmax in one pass.

Scores are in units of log2: `exp2` is the instruction that GPUs have. Source: Milakov and
Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: 1 / ln 2: scores times this are exponents of 2.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence_of(starts, tile, sequences, BLOCK: tl.constexpr):
    """The packed sequence that a tile belongs to, and the sequence's first tile.

    Sequence i has the tiles from `starts[i] // BLOCK + i` on, which is enough for its rows however
    they lie; `starts[sequences] // BLOCK + sequences` tiles do for all, a number that needs no look
    at the starts.
    """
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(starts + middle) // BLOCK + middle
        if begins <= tile:
            low = middle
        else:
            high = middle
    return low, tl.load(starts + low) // BLOCK + low


@triton.jit
def bounds_of(starts, sequence, tokens):
    """Where a packed sequence begins, and how many rows it has; never outside of the tensor."""
    begin = tl.minimum(tl.maximum(tl.load(starts + sequence), 0), tokens)
    end = tl.minimum(tl.load(starts + sequence + 1), tokens)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def load_rows(base, start, stride, row, inner, rows, width, EDGE: tl.constexpr,
              PADDED: tl.constexpr):  # fmt: skip
    """Rows `start + row` of a matrix, `[len(row), len(inner)]`; 0 outside of it.

    stride: from row to row, in eights of elements. EDGE: some of them may be behind its `rows`;
    PADDED: inner may be longer than its `width`.
    """
    # Only the first row may be far away: offsets in a tile are 32 bits.
    stride *= 8
    at = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + inner[None, :])
    if EDGE:
        mask = (row < rows - start)[:, None]
        if PADDED:
            mask &= (inner < width)[None, :]
        return tl.load(at, mask=mask, other=0.0)
    elif PADDED:
        return tl.load(at, mask=(inner < width)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def softmax_step(scores, top, total, out, EDGE: tl.constexpr):
    """Take a tile of scores into rows' running softmax.

    top: the largest score so far, `total`: the sum of `exp2(score - top)`, `out`: what those
    weights have summed up to. EDGE: a row's scores may all be -inf so far. Returns the weights of
    this tile in fp32, and the three; out is rescaled, the tile's values are to be added to it.
    """
    highest = tl.maximum(top, tl.max(scores, 1))
    base = highest
    if EDGE:
        base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    factor = tl.exp2(top - base)
    total = total * factor + tl.sum(weights, 1)
    return weights, highest, total, out * factor[:, None]


@triton.jit
def tiles_seen(first, last, shift, others, left, right, BLOCK: tl.constexpr):
    """Tiles of others, such as keys, for the rows from `first` to `last`: all from low to high.

    Row i sees the others from `i + shift - left` to `i + shift + right`. Returns low, inner_low,
    inner_high, high: tiles from inner_low to inner_high are seen by each of the rows, whole.
    """
    low = tl.maximum(first + shift - left, 0) // BLOCK
    high = tl.cdiv(tl.maximum(tl.minimum(last + shift + right + 1, others), 0), BLOCK)
    high = tl.maximum(high, low)
    inner_low = tl.cdiv(tl.maximum(last + shift - left, 0), BLOCK)
    inner_low = tl.minimum(inner_low, high)
    inner_high = tl.maximum(tl.minimum(first + shift + right + 1, others), 0) // BLOCK
    inner_high = tl.minimum(tl.maximum(inner_high, inner_low), high)
    return low, inner_low, inner_high, high


@triton.jit
def edge_tile(index, low, inner_low, inner_high):
    """The tile that is the `index`th of those that are not seen whole, on both sides."""
    before = inner_low - low
    return tl.where(index < before, low + index, inner_high + index - before)


@triton.jit
def is_seen(row, column, shift, columns, left, right):
    """Whether a row, such as a query, sees a column; shapes that broadcast.

    By two bounds for each row, so that a tile is only compared with them.
    """
    lowest = row + shift - left
    highest = tl.minimum(row + shift + right, columns - 1)
    return (column >= lowest) & (column <= highest)
