"""8-bit floats in OCP's encoding by their bits: the same on every GPU and in the interpreter.

gfx942 has instructions for another encoding only, sm_80 has none, and Triton's interpreter rounds
otherwise than torch does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: `FORMAT` of a kernel by what a tensor holds; 0: no 8-bit floats.
FORMATS = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}


@triton.jit
def widened(bits, kind: tl.constexpr, FORMAT: tl.constexpr):
    """The numbers that uint8 bits stand for, in a dtype that holds them all."""
    bits = bits.to(tl.uint16)
    if FORMAT == 2:
        return (bits << 8).to(tl.float16, bitcast=True).to(kind)
    # As fp16 the exponent is 8 too small.
    half = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
    number = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), number).to(kind)


@triton.jit
def narrowed(x, FORMAT: tl.constexpr):
    """Bits of the nearest numbers, the even one of two; beyond the largest that one; NaN stays."""
    MANTISSA: tl.constexpr = 3 if FORMAT == 1 else 2
    BIAS: tl.constexpr = 7 if FORMAT == 1 else 15
    LARGEST: tl.constexpr = 448.0 if FORMAT == 1 else 57344.0
    # Its last bit is worth the smallest number there is: adding it rounds to multiples of that.
    ANCHOR: tl.constexpr = 16384.0 if FORMAT == 1 else 128.0
    raw = x.to(tl.uint32, bitcast=True)
    sign = (raw >> 24) & 0x80
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.uint32, bitcast=True)
    tiny = (size + ANCHOR).to(tl.uint32, bitcast=True) & 0x7FFFFF
    rounded = bits + ((1 << (22 - MANTISSA)) - 1) + ((bits >> (23 - MANTISSA)) & 1)
    normal = (rounded >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA)
    code = tl.where(bits < ((128 - BIAS) << 23), tiny, normal)
    return (sign | tl.where(x != x, 0x7F, code)).to(tl.uint8)
