"""Arithmetic on the codes of block quantization, for kernels that quantize.

Everything is on the bits of numbers in integers, and rounds step by step as the reference does: a
code is the same on every GPU, also on those that have no fp8. A format is three constants: BITS of
a code, EXPONENT bits of it (0: an integer), SPECIALS codes at the top that are infinity or NaN.
Tiles are `[ROWS, BLOCK]`: BLOCK places, from `start` on, of ROWS blocks of `block` numbers each.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: 1.5 * 2^23: what is less than 2^22 and added to it becomes an integer, the even one of two.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)
#: The bits of infinity.
_INFINITY = tl.constexpr(0x7F800000)
_LEAST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def product(a, b, nothing):
    """a * b, rounded before anything is added to it.

    nothing: -0.0 as the kernel's argument. Compilers make one operation, with one rounding, of a
    product and the sum behind it; of this, whose addend they do not know, they cannot.
    """
    return tl.fma(a, b, nothing)


# --- Codes in memory ------------------------------------------------------------------------------


@triton.jit
def load_codes(codes, index, start, length, there, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Codes as int32; zeros outside of blocks.

    index: of each block, `[ROWS]`, int64. length: of a block in bytes, an argument of the kernel,
    of which Triton then knows whether 16 divides it: bytes are moved together.
    """
    COUNT: tl.constexpr = 4 if BITS == 6 else (1 if BITS == 8 else 2)
    BYTES: tl.constexpr = COUNT * BITS // 8
    word = start // COUNT + tl.arange(0, BLOCK // COUNT)
    mask = there[:, None] & (word * BYTES < length)[None, :]
    at = codes + (index * length)[:, None] + (word * BYTES)[None, :]
    found = tl.load(at, mask=mask, other=0).to(tl.int32)
    for byte in tl.static_range(1, BYTES):
        found |= tl.load(at + byte, mask=mask, other=0).to(tl.int32) << (8 * byte)
    # Each half beside the other, then each half of these: a thread keeps what it has loaded.
    if COUNT == 4:
        found = tl.interleave(found, found >> 2 * BITS)
    if COUNT > 1:
        found = tl.interleave(found, found >> BITS)
    return found & ((1 << BITS) - 1)


@triton.jit
def store_codes(
    codes,
    index,
    found,
    start,
    length,
    there,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The inverse of `load_codes`."""
    COUNT: tl.constexpr = 4 if BITS == 6 else (1 if BITS == 8 else 2)
    BYTES: tl.constexpr = COUNT * BITS // 8
    if COUNT > 1:
        place = tl.arange(0, COUNT)[None, None, :] * BITS
        found = tl.sum(tl.reshape(found, (ROWS, BLOCK // COUNT, COUNT)) << place, axis=2)
    word = start // COUNT + tl.arange(0, BLOCK // COUNT)
    mask = there[:, None] & (word * BYTES < length)[None, :]
    at = codes + (index * length)[:, None] + (word * BYTES)[None, :]
    for byte in tl.static_range(BYTES):
        tl.store(at + byte, (found >> (8 * byte)).to(tl.uint8), mask=mask)


# --- Codes to numbers -----------------------------------------------------------------------------


@triton.jit
def decoded(
    codes,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SPECIALS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """The numbers of int32 codes, exactly, before scale and zero."""
    if EXPONENT == 0:
        SIGN: tl.constexpr = 0 if ASYMMETRIC else 1 << (BITS - 1)
        value = ((codes ^ SIGN) - SIGN).to(tl.float32)
    else:
        MANTISSA: tl.constexpr = BITS - 1 - EXPONENT
        # Of the smallest number, less the bias of fp32.
        LEAST: tl.constexpr = 2 - (1 << (EXPONENT - 1)) - MANTISSA + 127
        magnitude = codes & ((1 << (BITS - 1)) - 1)
        exponent = magnitude >> MANTISSA
        fraction = magnitude & ((1 << MANTISSA) - 1)
        n = fraction + tl.where(exponent > 0, 1 << MANTISSA, 0)
        power = (tl.maximum(exponent, 1) - 1 + LEAST) << 23
        bits = (n.to(tl.float32) * power.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        if SPECIALS > 0:
            special = _INFINITY | ((magnitude << (23 - MANTISSA)) & 0x7FFFFF)
            bits = tl.where(magnitude >= (1 << (BITS - 1)) - SPECIALS, special, bits)
        value = (bits | ((codes >> (BITS - 1)) << 31)).to(tl.float32, bitcast=True)
    return value


# --- The range of a block -------------------------------------------------------------------------


@triton.jit
def magnitude_of(value):
    """|value| as bits: infinity is above all numbers, NaN above infinity."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scaling(largest, low, high, inverse_max, ASYMMETRIC: tl.constexpr):
    """(scale, zero, whether all is finite) from the largest `magnitude_of` and the range."""
    extent = largest.to(tl.float32, bitcast=True)
    zero = extent * 0.0
    if ASYMMETRIC:
        extent = high - low
        zero = low
    finite = (largest < _INFINITY) & (magnitude_of(extent) < _INFINITY)
    scale = tl.where(finite, tl.maximum(extent * inverse_max, _LEAST_SCALE), float("nan"))
    return scale, tl.where(finite, zero, 0.0), finite


# --- Numbers to codes -----------------------------------------------------------------------------


@triton.jit
def key_of(seed, row):
    """Of the random bits of each block: the step of SplitMix64, with the block as its counter."""
    z = (row.to(tl.int64) + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.int64).to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _chance(key, place):
    """Multiples of 2^-24 in [0, 1) of (key of the block, place in it)."""
    h = place.to(tl.uint32)[None, :] * 0x9E3779B9 + key.to(tl.uint32)[:, None]
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = h ^ (key >> 32).to(tl.uint32)[:, None]
    h = (h ^ (h >> 15)) * 0x735A2D97
    h = h ^ (h >> 15)
    return (h >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def rounded(value, key, place, STOCHASTIC: tl.constexpr):
    """Integers of |value| < 2^22: the nearest, or up with the probability of the fraction."""
    if STOCHASTIC:
        low = tl.floor(value)
        found = low.to(tl.int32) + tl.where(_chance(key, place) < value - low, 1, 0)
    else:
        found = (value + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS
    return found


@triton.jit
def encoded(
    value,
    key,
    place,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SPECIALS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The int32 codes of finite numbers that zero and scale are off."""
    if EXPONENT == 0:
        HIGHEST: tl.constexpr = (1 << BITS) - 1 if ASYMMETRIC else (1 << (BITS - 1)) - 1
        LOWEST: tl.constexpr = 0 if ASYMMETRIC else -HIGHEST
        number = rounded(value, key, place, STOCHASTIC)
        codes = tl.minimum(tl.maximum(number, LOWEST), HIGHEST) & ((1 << BITS) - 1)
    else:
        # With E = max(exponent, that of the smallest normal number), |v| = n * 2^(E - mantissa).
        # The code is n, rounded, behind the exponent E: n's leading one adds 1 to it, if there is
        # one, and so does rounding up to the next power of two.
        MANTISSA: tl.constexpr = BITS - 1 - EXPONENT
        LEAST: tl.constexpr = 2 - (1 << (EXPONENT - 1))
        LARGEST: tl.constexpr = (1 << (BITS - 1)) - 1 - SPECIALS
        magnitude = magnitude_of(value)
        exponent = tl.maximum((magnitude >> 23) - 127, LEAST)
        power = ((MANTISSA + 127 - exponent) << 23).to(tl.float32, bitcast=True)
        n = rounded(magnitude.to(tl.float32, bitcast=True) * power, key, place, STOCHASTIC)
        codes = tl.minimum(((exponent - LEAST) << MANTISSA) + n, LARGEST)
        codes |= tl.where(value.to(tl.int32, bitcast=True) < 0, 1 << (BITS - 1), 0)
    return codes
