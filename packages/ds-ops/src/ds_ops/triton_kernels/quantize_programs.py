"""What programs of quantization do with their blocks.

`quantize.py` says what for, and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_ops.triton_kernels.block_codes import (
    decoded,
    encoded,
    key_of,
    load_codes,
    magnitude_of,
    product,
    scaling,
    store_codes,
)


@triton.jit
def _told(
    codes,
    scale,
    zero,
    nothing,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SPECIALS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """What a tile of codes stands for."""
    value = decoded(codes, BITS, EXPONENT, SPECIALS, ASYMMETRIC)
    value = product(value, scale[:, None], nothing)
    if ASYMMETRIC:
        value += zero[:, None]
    return value


@triton.jit
def _sum(
    x,
    x_scales,
    x_zeros,
    row,
    there,
    start,
    blocks,
    x_length,
    ranks,
    nothing,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SPECIALS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of the sum of quantized numbers over ranks, in their order."""
    total = tl.full((ROWS, BLOCK), nothing, tl.float32)  # -0.0, which changes no number
    index = row.to(tl.int64)
    for _ in range(ranks):
        codes = load_codes(x, index, start, x_length, there, BITS, BLOCK)
        scale = tl.load(x_scales + index, mask=there, other=0.0)
        zero = scale
        if ASYMMETRIC:
            zero = tl.load(x_zeros + index, mask=there, other=0.0)
        total += _told(codes, scale, zero, nothing, BITS, EXPONENT, SPECIALS, ASYMMETRIC)
        index += blocks
    return total


@triton.jit
def _given(
    x,
    x_scales,
    x_zeros,
    error,
    row,
    there,
    start,
    blocks,
    block,
    x_length,
    ranks,
    factor,
    nothing,
    X_BITS: tl.constexpr,
    X_EXPONENT: tl.constexpr,
    X_SPECIALS: tl.constexpr,
    X_ASYMMETRIC: tl.constexpr,
    FEEDBACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of what is quantized, and of the error that it contains."""
    column = start + tl.arange(0, BLOCK)
    mask = there[:, None] & (column < block)[None, :]
    at = row.to(tl.int64)[:, None] * block + column[None, :]
    if X_BITS == 0:
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    else:
        value = _sum(
            x,
            x_scales,
            x_zeros,
            row,
            there,
            start,
            blocks,
            x_length,
            ranks,
            nothing,
            X_BITS,
            X_EXPONENT,
            X_SPECIALS,
            X_ASYMMETRIC,
            ROWS,
            BLOCK,
        )
        value = product(value, factor, nothing)
    old = value
    if FEEDBACK:
        old = tl.load(error + at, mask=mask, other=0.0).to(tl.float32)
        value += old
    return tl.where(mask, value, 0.0), old


@triton.jit
def _left(
    error,
    codes,
    value,
    old,
    row,
    there,
    start,
    block,
    scale,
    zero,
    beta,
    nothing,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SPECIALS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a tile of `beta * error + (1 - beta) * (what was quantized - what its codes say)`."""
    lost = value - _told(codes, scale, zero, nothing, BITS, EXPONENT, SPECIALS, ASYMMETRIC)
    new = product(old, beta, nothing) + product(lost, 1.0 - beta, nothing)
    column = start + tl.arange(0, BLOCK)
    mask = there[:, None] & (column < block)[None, :]
    at = row.to(tl.int64)[:, None] * block + column[None, :]
    tl.store(error + at, new.to(error.dtype.element_ty), mask=mask)


@triton.jit
def _place_of(row, blocks, outer, inner, SWIZZLED: tl.constexpr):
    """Where the codes of each block go: part (i, j) of `outer * inner` to place (j, i)."""
    place = row
    if SWIZZLED:
        length = blocks // (outer * inner)
        part = row // length
        place = ((part % inner) * outer + part // inner) * length + row % length
    return place.to(tl.int64)


@triton.jit(do_not_specialize=["blocks", "ranks", "seed", "outer", "inner"])
def quantize_tile(
    x,
    x_scales,
    x_zeros,
    error,
    codes,
    scales,
    zeros,
    blocks,
    block,
    x_length,
    length,
    ranks,
    factor,
    beta,
    inverse_max,
    seed,
    outer,
    inner,
    nothing,
    X_BITS: tl.constexpr,
    X_EXPONENT: tl.constexpr,
    X_SPECIALS: tl.constexpr,
    X_ASYMMETRIC: tl.constexpr,
    FEEDBACK: tl.constexpr,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SPECIALS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SWIZZLED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """ROWS blocks; WHOLE: of no more than BLOCK numbers, which then stay in registers.

    X_BITS 0: of numbers x; else of factor times the sum of `ranks` times as many codes x. The codes
    of a block are x_length and length bytes.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < blocks
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((ROWS, BLOCK), tl.int32)
    low = tl.full((ROWS, BLOCK), float("inf"), tl.float32)
    high = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    value = high
    old = high
    for start in range(0, BLOCK if WHOLE else block, BLOCK):
        value, old = _given(
            x,
            x_scales,
            x_zeros,
            error,
            row,
            there,
            start,
            blocks,
            block,
            x_length,
            ranks,
            factor,
            nothing,
            X_BITS,
            X_EXPONENT,
            X_SPECIALS,
            X_ASYMMETRIC,
            FEEDBACK,
            ROWS,
            BLOCK,
        )
        largest = tl.maximum(largest, magnitude_of(value))
        if ASYMMETRIC:
            mask = (start + column < block)[None, :]
            low = tl.minimum(low, tl.where(mask, value, float("inf")))
            high = tl.maximum(high, tl.where(mask, value, float("-inf")))
    scale, zero, finite = scaling(
        tl.max(largest, axis=1), tl.min(low, axis=1), tl.max(high, axis=1), inverse_max, ASYMMETRIC
    )
    inverse = tl.div_rn(1.0, scale)
    place = _place_of(row, blocks, outer, inner, SWIZZLED)
    tl.store(scales + place, scale, mask=there)
    if ASYMMETRIC:
        tl.store(zeros + place, zero, mask=there)
    key = row
    if STOCHASTIC:
        key = key_of(seed, row)
    for start in range(0, BLOCK if WHOLE else block, BLOCK):
        if not WHOLE:
            value, old = _given(
                x,
                x_scales,
                x_zeros,
                error,
                row,
                there,
                start,
                blocks,
                block,
                x_length,
                ranks,
                factor,
                nothing,
                X_BITS,
                X_EXPONENT,
                X_SPECIALS,
                X_ASYMMETRIC,
                FEEDBACK,
                ROWS,
                BLOCK,
            )
        scaled = product(value - zero[:, None], inverse[:, None], nothing)
        scaled = tl.where(finite[:, None], scaled, 0.0)
        found = encoded(
            scaled, key, start + column, BITS, EXPONENT, SPECIALS, ASYMMETRIC, STOCHASTIC
        )
        found = tl.where(finite[:, None], found, 0)
        store_codes(codes, place, found, start, length, there, BITS, ROWS, BLOCK)
        if FEEDBACK:
            # What is not finite leaves the error as it was.
            _left(
                error,
                found,
                value,
                old,
                row,
                there & finite,
                start,
                block,
                scale,
                zero,
                beta,
                nothing,
                BITS,
                EXPONENT,
                SPECIALS,
                ASYMMETRIC,
                BLOCK,
            )


@triton.jit(do_not_specialize=["blocks"])
def dequantize_tile(
    codes,
    scales,
    zeros,
    y,
    blocks,
    block,
    length,
    nothing,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SPECIALS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK numbers of each of ROWS blocks."""
    parts = tl.cdiv(block, BLOCK)
    row = (tl.program_id(0) // parts) * ROWS + tl.arange(0, ROWS)
    start = (tl.program_id(0) % parts) * BLOCK
    there = row < blocks
    index = row.to(tl.int64)
    scale = tl.load(scales + index, mask=there, other=0.0)
    zero = scale
    if ASYMMETRIC:
        zero = tl.load(zeros + index, mask=there, other=0.0)
    found = load_codes(codes, index, start, length, there, BITS, BLOCK)
    value = _told(found, scale, zero, nothing, BITS, EXPONENT, SPECIALS, ASYMMETRIC)
    column = start + tl.arange(0, BLOCK)
    mask = there[:, None] & (column < block)[None, :]
    at = index[:, None] * block + column[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)
