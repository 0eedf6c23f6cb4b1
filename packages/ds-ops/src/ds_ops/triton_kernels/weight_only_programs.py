"""What programs of products with packed weights do.

`weight_only_linear.py` says what for, and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Formats as the kernels know them.
FORMATS = {"int8": 0, "fp8_e4m3": 1, "fp6_e3m2": 2, "int4": 3}
_INT8, _FP8, _FP6, _INT4 = (tl.constexpr(number) for number in FORMATS.values())
#: Inputs whose codes are one word, or three for fp6.
INPUTS_PER_UNIT = {"int8": 1, "fp8_e4m3": 1, "fp6_e3m2": 16, "int4": 8}


@triton.jit
def _words(codes, output, unit, mask, depth, PART: tl.constexpr, WORDS: tl.constexpr):
    """Word PART of those WORDS that hold each unit's codes, `[units, outputs]`."""
    per_block = depth.to(tl.int64) * 16
    at = (output // 16) * per_block + output % 16
    return tl.load(codes + at[None, :] + (unit * (16 * WORDS) + 16 * PART)[:, None], mask, 0)


@triton.jit
def _int4(bits):
    """From codes in bits 19 to 22: floats in [1, 2), with code + 8 in their fractions."""
    return ((bits & 0x00780000) ^ 0x3FC00000).to(tl.float32, bitcast=True)


@triton.jit
def _fp6(bits):
    """From codes in the highest bits: sign, exponent and fraction to where fp32 has them.

    The product sets the exponent's bias right, of subnormals too.
    """
    return ((bits >> 5) & -0x7C200000).to(tl.float32, bitcast=True) * 2.1267647932558654e37


@triton.jit
def _bytes(code, FORMAT: tl.constexpr):
    """From codes of 8 bits; fp8 as `_fp6`."""
    if FORMAT == _INT8:
        return code.to(tl.float32)
    else:
        bits = (code.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _read(codes, output, unit, mask, units, FORMAT: tl.constexpr):
    """The words of each unit, `[units, outputs]`; of fp6 its codes by fours, in 24 bits."""
    if FORMAT == _FP6:
        first = _words(codes, output, unit, mask, units * 3, 0, 3)
        second = _words(codes, output, unit, mask, units * 3, 1, 3)
        third = _words(codes, output, unit, mask, units * 3, 2, 3)
        return (
            first,
            ((first >> 24) & 0xFF) | (second << 8),
            ((second >> 16) & 0xFFFF) | (third << 16),
            third >> 8,
        )
    else:
        return (_words(codes, output, unit, mask, units, 0, 1),)


@triton.jit
def _level(words, J: tl.constexpr, FORMAT: tl.constexpr):
    """What the code of each unit's input J stands for, fp32 `[units, outputs]`; see `_offset`."""
    if FORMAT == _FP6:
        return _fp6(words[J // 4] << (26 - 6 * (J % 4)))
    elif FORMAT == _INT4:
        return _int4(words[0] << (19 - 4 * J) if J < 5 else words[0] >> (4 * J - 19))
    else:
        return _bytes(words[0], FORMAT)


@triton.jit
def _offset(zero, FORMAT: tl.constexpr):
    """What is to be taken off levels, which are weights then but for scale and `_factor`."""
    return 1.5 + zero * 0.0625 if FORMAT == _INT4 else zero


@triton.jit
def _factor(FORMAT: tl.constexpr):
    return 16.0 if FORMAT == _INT4 else 1.0


@triton.jit(do_not_specialize=["parts"])
def linear_one(
    x,
    codes,
    scales,
    zeros,
    bias,
    y,
    outputs,
    depth,
    parts,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_UNIT: tl.constexpr,
    ZEROS: tl.constexpr,
    BIASED: tl.constexpr,
    UNITS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """16 outputs of one row, over one of `parts` parts of the inputs.

    y: `[outputs]`; with more than one part `[parts, outputs]`, fp32, without bias. Only tensors of
    two dimensions, as codes lie in memory: each thread keeps the words that it reads, and is handed
    none of another's.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    units = depth // PER_UNIT
    share = tl.cdiv(tl.cdiv(units, parts), UNITS) * UNITS
    stop = tl.minimum((part + 1) * share, units)
    output = block * 16 + tl.arange(0, 16)
    own = block.to(tl.int64) * (depth // GROUP) * 16 + tl.arange(0, 16)
    total = tl.zeros((UNITS, 16), tl.float32)
    for start in tl.range(part * share, stop, UNITS, num_stages=AHEAD):
        unit = start + tl.arange(0, UNITS)
        there = unit < units
        mask = there[:, None]
        group = own[None, :] + (unit * PER_UNIT // GROUP * 16)[:, None]
        scale = tl.load(scales + group, mask=mask, other=0.0).to(tl.float32)
        zero = tl.zeros((UNITS, 16), tl.float32)
        if ZEROS:
            zero = tl.load(zeros + group, mask=mask, other=0.0).to(tl.float32)
        offset = _offset(zero, FORMAT)
        words = _read(codes, output, unit, mask, units, FORMAT)
        found = tl.zeros((UNITS, 16), tl.float32)
        added = tl.zeros((UNITS,), tl.float32)
        for j in tl.static_range(PER_UNIT):
            value = tl.load(x + unit * PER_UNIT + j, mask=there, other=0.0).to(tl.float32)
            level = _level(words, j, FORMAT)
            if x.dtype.element_ty == tl.float32:
                # Exact, as sums in fp32 would not be; 16 bits of x do not show the difference.
                level = level - offset
            found += value[:, None] * level
            added += value
        if x.dtype.element_ty != tl.float32 and (ZEROS or FORMAT == _INT4):
            found -= added[:, None] * offset
        total += found * (scale * _factor(FORMAT))
    out = tl.sum(total, axis=0)
    inside = output < outputs
    if BIASED:
        out += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
    at = part.to(tl.int64) * outputs + output
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _weight(words, offset, scale, J: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Weights of each unit's input J, `[units, outputs]`."""
    level = _level(words, J, FORMAT)
    if level.dtype == DTYPE:
        return (level - offset) * scale
    else:
        return (level * scale - offset * scale).to(DTYPE)  # one instruction, exact enough


@triton.jit
def _eight(words, offset, scale, FIRST: tl.constexpr, STEP: tl.constexpr, FORMAT: tl.constexpr,
           DTYPE: tl.constexpr):  # fmt: skip
    """Weights of 8 inputs of each unit, every STEP-th, `[units, outputs, 2, 2, 2]`."""
    w0 = _weight(words, offset, scale, FIRST, FORMAT, DTYPE)
    w1 = _weight(words, offset, scale, FIRST + STEP, FORMAT, DTYPE)
    w2 = _weight(words, offset, scale, FIRST + 2 * STEP, FORMAT, DTYPE)
    w3 = _weight(words, offset, scale, FIRST + 3 * STEP, FORMAT, DTYPE)
    w4 = _weight(words, offset, scale, FIRST + 4 * STEP, FORMAT, DTYPE)
    w5 = _weight(words, offset, scale, FIRST + 5 * STEP, FORMAT, DTYPE)
    w6 = _weight(words, offset, scale, FIRST + 6 * STEP, FORMAT, DTYPE)
    w7 = _weight(words, offset, scale, FIRST + 7 * STEP, FORMAT, DTYPE)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    return tl.join(even, tl.join(tl.join(w1, w5), tl.join(w3, w7)))


@triton.jit
def _tile(codes, scales, zeros, output, width, step, depth, GROUP: tl.constexpr,
          FORMAT: tl.constexpr, PER_UNIT: tl.constexpr, ZEROS: tl.constexpr,
          K: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Weights of inputs [step * K, (step + 1) * K), `[outputs, K]`; K divides GROUP.

    output: numbers of outputs, of which those below width are packed. A thread that reads a word
    has all its inputs, next to each other, and stores them for the product at once.
    """
    inside = output < width
    at = ((output // 16).to(tl.int64) * (depth // GROUP) + step * K // GROUP) * 16 + output % 16
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32) * _factor(FORMAT)
    zero = tl.zeros(output.shape, tl.float32)
    if ZEROS:
        zero = tl.load(zeros + at, mask=inside, other=0.0).to(tl.float32)
    offset, scale = _offset(zero, FORMAT)[None, :], scale[None, :]
    unit = step * (K // PER_UNIT) + tl.arange(0, K // PER_UNIT)
    words = _read(codes, output, unit, inside[None, :], depth // PER_UNIT, FORMAT)
    if FORMAT == _INT4:
        found = _eight(words, offset, scale, 0, 1, FORMAT, DTYPE)
        if K < 64:  # for sm_100 Triton finds no layout for so short rows
            found = tl.permute(found, (0, 2, 3, 4, 1))
            return tl.trans(tl.reshape(found, (K, output.shape[0])))
        found = tl.permute(found, (1, 0, 2, 3, 4))
    elif FORMAT == _FP6:
        even = _eight(words, offset, scale, 0, 2, FORMAT, DTYPE)
        found = tl.join(even, _eight(words, offset, scale, 1, 2, FORMAT, DTYPE))
        if K < 128:
            found = tl.permute(found, (0, 2, 3, 4, 5, 1))
            return tl.trans(tl.reshape(found, (K, output.shape[0])))
        found = tl.permute(found, (1, 0, 2, 3, 4, 5))
    else:
        found = tl.trans(_weight(words, offset, scale, 0, FORMAT, DTYPE))
    return tl.reshape(found, (output.shape[0], K))


@triton.jit
def _product(a, b, total):
    """total + a b, of fp32 not in fewer bits."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit(do_not_specialize=["rows", "parts"])
def linear_many(
    x,
    codes,
    scales,
    zeros,
    bias,
    y,
    rows,
    outputs,
    depth,
    parts,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_UNIT: tl.constexpr,
    ZEROS: tl.constexpr,
    BIASED: tl.constexpr,
    BACKWARD: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """A tile of `x W^T + bias`, `[M, N]`, over one of `parts` parts of the inputs.

    BACKWARD: of `x W`, `[M, K]`, over a part of the outputs; x is `[rows, outputs]` then, and y
    `[rows, depth]`. With more than one part y is `[parts, rows, ...]`, fp32, without bias. Programs
    that share weights run side by side, so that these are read from memory once.
    """
    tiles = tl.cdiv(rows, M)
    row = (tl.program_id(0) % tiles) * M + tl.arange(0, M)
    tile = tl.program_id(0) // tiles
    part = tl.program_id(1)
    width = tl.cdiv(outputs, 16) * 16
    there = (row < rows)[:, None]
    if BACKWARD:
        share = tl.cdiv(tl.cdiv(outputs, N), parts)
        total = tl.zeros((M, K), tl.float32)
        for step in range(part * share, tl.minimum((part + 1) * share, tl.cdiv(outputs, N))):
            output = step * N + tl.arange(0, N)
            at = row.to(tl.int64)[:, None] * outputs + output[None, :]
            left = tl.load(x + at, mask=there & (output < outputs)[None, :], other=0.0)
            w = _tile(codes, scales, zeros, output, width, tile, depth, GROUP, FORMAT, PER_UNIT,
                      ZEROS, K, x.dtype.element_ty)  # fmt: skip
            total = _product(left, w, total)
        column = tile * K + tl.arange(0, K)
        long = depth
    else:
        share = tl.cdiv(depth // K, parts)
        output = tile * N + tl.arange(0, N)
        total = tl.zeros((M, N), tl.float32)
        for step in range(part * share, tl.minimum((part + 1) * share, depth // K)):
            at = row.to(tl.int64)[:, None] * depth + (step * K + tl.arange(0, K))[None, :]
            left = tl.load(x + at, mask=there, other=0.0)
            w = _tile(codes, scales, zeros, output, width, step, depth, GROUP, FORMAT, PER_UNIT,
                      ZEROS, K, x.dtype.element_ty)  # fmt: skip
            total = _product(left, tl.trans(w), total)
        column = output
        long = outputs
        if BIASED:
            added = tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)
            total += added[None, :]
    at = (part * rows + row).to(tl.int64)[:, None] * long + column[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=there & (column < long)[None, :])


@triton.jit(do_not_specialize=["count"])
def add_parts(parts, bias, y, size, width, count, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of `count` parts `[size]`, in their order, + bias; rows are of `width`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + part * size + at, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + at % width, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
