"""Block quantization to 4, 6, 8 and 12 bits, integers and floats, with or without error feedback.

Sources: ZeRO++ (Wang et al. 2023, section 3) for blocks; OCP Microscaling Formats (2023, section
5.3) for fp8, fp6 and fp4; LoCo (Xie et al. 2024) for the error's moving average.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from ds_core.ops import block_format as bf
from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_together,
    randn,
    unaligned,
    wide,
    wide_dtype,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS, EXACT
from ds_core.seams.op import Floor, Op

QUANTIZE = "quantize_blocks"
FEEDBACK = "quantize_feedback_"
DEQUANTIZE = "dequantize_blocks"

Format = Literal[
    "int8", "int4", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "fp12_e4m7"
]


class Quantized(NamedTuple):
    """Numbers in blocks: `number of the code * scale`, or `+ zero`.

    Attributes:
        codes: `[..., d * bits / 8]`, uint8: the bytes that travel. The codes of a block are one
            stream of bits, the first in the lowest. Symmetric integers are in two's complement,
            so `codes.view(torch.int8)` are those of "int8"; those of fp8 view as torch's dtypes.
        scales: `[..., d / block]`, fp32; NaN for a block that held a NaN or infinity.
        zeros: `[..., d / block]`, fp32: what code 0 stands for; None if symmetric.
        format: of the codes.
        block: numbers per scale.
        dtype: of what was quantized; the default of `dequantize`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    format: str
    block: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of everything that must travel."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.codes.nbytes + self.scales.nbytes + zeros


def quantize(
    x: torch.Tensor,
    format: Format = "int8",
    *,
    block: int = 128,
    symmetric: bool = True,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int | None = None,
    error: torch.Tensor | None = None,
    beta: float = 0.0,
    swizzle: tuple[int, int] | None = None,
) -> Quantized:
    """`x` in blocks along its last dimension, each with a scale of its own.

    The scale is `max |x| / largest number of the format`, so that nothing is cut off. Codes are
    `x / scale` rounded; they are the same bit for bit on any device and with any number of threads.

    A block that holds a NaN or infinity gets the scale NaN: an overflow is never hidden.
    `dequantize` refuses it, or makes the whole block NaN when told to.

    Args:
        x: `[..., d]`, fp32, bf16 or fp16, contiguous.
        block: divides d; its codes fill whole bytes.
        symmetric: False, for integers: from the least to the largest number of each block, whose
            distance must be finite in fp32.
        rounding: "stochastic" rounds up with the probability of the fraction, so that the mean of
            many draws is x.
        seed: of the stochastic rounding; the same seed gives the same codes. None: drawn from
            torch's generator (which a compiled function cannot do: give one there).
        error: x's shape, fp32 or x's dtype, changed in place: what earlier calls left out. It is
            added to x, and becomes `beta * error + (1 - beta) * (x + error - dequantized)`. A
            block with scale NaN leaves it as it was.
        beta: 0 is plain error feedback, more averages it over steps (LoCo).
        swizzle: (outer, inner): x, as `outer * inner` equal parts, part (i, j) stored as part
            (j, i): what goes to one rank of a hierarchical all-to-all is then contiguous.

    Raises OpError for what does not fit.
    """
    fmt = bf.format_named("quantize", format)
    drawn = drawn_seed("quantize", rounding, seed)
    outer, inner = swizzle or (1, 1)
    if error is None:
        made = run(QUANTIZE, x, fmt.number, block, symmetric, drawn, outer, inner)
    else:
        rest = (fmt.number, block, symmetric, drawn, outer, inner)
        made = run(FEEDBACK, x, error, float(beta), *rest)
    codes, scales, zeros = made
    return Quantized(codes, scales, None if symmetric else zeros, format, block, x.dtype)


def dequantize(
    q: Quantized, dtype: torch.dtype | None = None, *, propagate: bool = False
) -> torch.Tensor:
    """The numbers that `q` stands for, `[..., d]`.

    Args:
        dtype: fp32, bf16 or fp16; None: that of what was quantized.
        propagate: True: a block whose scale is not finite becomes NaN, as after a sum of numbers
            that overflowed. False: it is an error.

    Raises OpError (RuntimeError, in C++) for what does not fit and for scales that are not finite.
    """
    fmt = bf.format_named("dequantize", q.format)
    wanted = q.dtype if dtype is None else dtype
    result: torch.Tensor = run(
        DEQUANTIZE, q.codes, q.scales, q.zeros, fmt.number, q.block, wanted, propagate
    )
    return result


def drawn_seed(op: str, rounding: str, seed: int | None) -> int | None:
    """What operators take: None for nearest."""
    expect(
        rounding in ("nearest", "stochastic"), op, "rounding", rounding, '"nearest" or "stochastic"'
    )
    if rounding == "nearest":
        expect(seed is None, op, "seed", seed, 'None, or rounding="stochastic"')
        return None
    if seed is None:
        return int(torch.randint(1 << 62, ()))
    expect(-(1 << 63) <= seed < 1 << 63, op, "seed", seed, "64 bits")
    return seed


# --- Quantizing -----------------------------------------------------------------------------------

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    x: torch.Tensor,
    format: int,
    block: int,
    symmetric: bool,
    seed: int | None,
    outer: int,
    inner: int,
) -> Results:
    """(codes, scales, zeros) as of `quantize`; zeros are empty if symmetric; seed None: nearest."""
    fmt = _check(QUANTIZE, x, format, block, symmetric, outer, inner)
    blocks = wide(x).reshape(-1, block)
    codes, scales, zeros = encoded(blocks, fmt, symmetric, seed)
    parts = _swizzled(outer, inner, codes, scales, zeros)
    return shaped(parts, x.shape, fmt, block, symmetric)


def feedback_reference(
    x: torch.Tensor,
    error: torch.Tensor,
    beta: float,
    format: int,
    block: int,
    symmetric: bool,
    seed: int | None,
    outer: int,
    inner: int,
) -> Results:
    """The same of `x + error`, and `error` in place as `quantize` says."""
    fmt = _check(FEEDBACK, x, format, block, symmetric, outer, inner)
    check_error(FEEDBACK, error, beta, x.shape, x.dtype, x.device)
    blocks = wide(x).reshape(-1, block) + error.to(wide_dtype(x.dtype)).reshape(-1, block)
    codes, scales, zeros = encoded(blocks, fmt, symmetric, seed)
    update_error(error, beta, blocks, codes, scales, zeros, fmt, symmetric)
    parts = _swizzled(outer, inner, codes, scales, zeros)
    return shaped(parts, x.shape, fmt, block, symmetric)


def encoded(
    blocks: torch.Tensor, fmt: bf.BlockFormat, symmetric: bool, seed: int | None
) -> Results:
    """Packed codes, scales and zeros of `[blocks, block]`, one row or number per block."""
    scales, zeros = bf.scales_of(blocks, fmt, symmetric)
    codes = bf.encode(blocks, scales, zeros, fmt, symmetric, seed)
    return bf.pack(codes, fmt.bits), scales, zeros


def update_error(
    error: torch.Tensor,
    beta: float,
    blocks: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    fmt: bf.BlockFormat,
    symmetric: bool,
) -> None:
    """`error = beta * error + (1 - beta) * (blocks - dequantized)` where scales are finite."""
    told = bf.decode(bf.unpack(codes, fmt.bits), scales, None if symmetric else zeros, fmt)
    # In fp32 throughout, so that every implementation rounds alike.
    factor = blocks.new_tensor(beta)
    old = error.to(blocks.dtype).view_as(blocks)
    new = old * factor + (blocks - told) * (1 - factor)
    new = torch.where(scales.isfinite()[:, None], new, old)
    error.copy_(new.view_as(error))


def shaped(
    rows: Results,
    shape: torch.Size,
    fmt: bf.BlockFormat,
    block: int,
    symmetric: bool,
) -> Results:
    """Results per block in the shapes that `Quantized` has."""
    codes, scales, zeros = rows
    *lead, width = shape
    per_block = (*lead, width // block)
    zeros = zeros.new_empty(0) if symmetric else zeros.view(per_block)
    return codes.view(*lead, fmt.packed_bytes(width)), scales.view(per_block), zeros


def _swizzled(outer: int, inner: int, *results: torch.Tensor) -> Results:
    turned = []
    for rows in results:
        parts = rows.view(outer, inner, len(rows) // (outer * inner), *rows.shape[1:])
        turned.append(parts.transpose(0, 1).reshape(rows.shape))
    codes, scales, zeros = turned
    return codes, scales, zeros


def _check(
    op: str, x: torch.Tensor, format: int, block: int, symmetric: bool, outer: int, inner: int
) -> bf.BlockFormat:
    expect_float(op, "x", x)
    expect(x.dim() >= 1, op, "x", "a scalar", "[..., d]")
    fmt = bf.format_numbered(op, format, symmetric)
    bf.check_block(op, block, x.shape[-1], fmt)
    expect(outer >= 1 and inner >= 1, op, "swizzle", (outer, inner), "two positive numbers")
    blocks = x.numel() // block
    told = f"two numbers whose product divides the {blocks} blocks"
    expect(blocks % (outer * inner) == 0, op, "swizzle", (outer, inner), told)
    return fmt


def check_error(
    op: str,
    error: torch.Tensor,
    beta: float,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise OpError unless `error` can hold what quantizing such numbers leaves out."""
    allowed = error.dtype in (torch.float32, dtype)
    expect(allowed, op, "error", error.dtype, f"torch.float32 or {dtype}")
    expect_shape(op, "error", error, shape)
    expect(error.is_contiguous(), op, "error", "not contiguous", "contiguous")
    expect(error.device == device, op, "error", f"on {error.device}", f"on {device}")
    expect(0 <= beta < 1, op, "beta", beta, "0 <= beta < 1")


def empty_results(
    like: torch.Tensor, shape: torch.Size, fmt: bf.BlockFormat, block: int, symmetric: bool
) -> Results:
    """For fake kernels."""
    *lead, width = shape
    per_block = (*lead, width // block)
    scale_dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return (
        like.new_empty((*lead, fmt.packed_bytes(width)), dtype=torch.uint8),
        like.new_empty(per_block, dtype=scale_dtype),
        like.new_empty((0,) if symmetric else per_block, dtype=scale_dtype),
    )


def fake(
    x: torch.Tensor,
    format: int,
    block: int,
    symmetric: bool,
    seed: int | None,
    outer: int,
    inner: int,
) -> Results:
    fmt = _check(QUANTIZE, x, format, block, symmetric, outer, inner)
    return empty_results(x, x.shape, fmt, block, symmetric)


def feedback_fake(
    x: torch.Tensor,
    error: torch.Tensor,
    beta: float,
    format: int,
    block: int,
    symmetric: bool,
    seed: int | None,
    outer: int,
    inner: int,
) -> Results:
    fmt = _check(FEEDBACK, x, format, block, symmetric, outer, inner)
    check_error(FEEDBACK, error, beta, x.shape, x.dtype, x.device)
    return empty_results(x, x.shape, fmt, block, symmetric)


# --- Dequantizing ---------------------------------------------------------------------------------


def dequantize_reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
    dtype: torch.dtype,
    propagate: bool,
) -> torch.Tensor:
    """The numbers of `dequantize`; codes are symmetric if there are no zeros."""
    fmt, shape = check_quantized(DEQUANTIZE, codes, scales, zeros, format, block)
    _check_dtype(dtype)
    if not propagate:
        check_finite(scales, zeros)
    return decoded(codes, scales, zeros, fmt, block).to(dtype).view(shape)


def decoded(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    fmt: bf.BlockFormat,
    block: int,
) -> torch.Tensor:
    """`[blocks, block]` numbers in the dtype of the scales."""
    rows = codes.reshape(scales.numel(), fmt.packed_bytes(block))
    flat_zeros = None if zeros is None else zeros.reshape(-1)
    return bf.decode(bf.unpack(rows, fmt.bits), scales.reshape(-1), flat_zeros, fmt)


def check_quantized(
    op: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
) -> tuple[bf.BlockFormat, torch.Size]:
    """The format and the shape of the numbers. Raises OpError for what does not fit together."""
    fmt = bf.format_numbered(op, format, zeros is None)
    bf.check_block(op, block, block, fmt)
    expect(codes.dtype is torch.uint8, op, "codes", codes.dtype, torch.uint8)
    expect(codes.dim() >= 1, op, "codes", "a scalar", "[..., bytes]")
    *lead, row = codes.shape
    block_bytes = fmt.packed_bytes(block)
    told = f"a multiple of the {block_bytes} bytes of a block of {block}"
    expect(row % block_bytes == 0, op, "codes", f"rows of {row} bytes", told)
    blocks = row // block_bytes
    for argument, t in (("scales", scales), ("zeros", zeros)):
        if t is not None:
            is_fp32 = t.dtype in (torch.float32, torch.float64)
            expect(is_fp32, op, argument, t.dtype, torch.float32)
            expect_shape(op, argument, t, (*lead, blocks))
    expect_together(op, codes, scales=scales, zeros=zeros)
    return fmt, torch.Size((*lead, blocks * block))


def _check_dtype(dtype: torch.dtype) -> None:
    told = "torch.float32, torch.bfloat16 or torch.float16"
    expect(dtype in (*FLOATS, torch.float64), DEQUANTIZE, "dtype", dtype, told)


def check_finite(scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
    """Raise OpError for the first scale or zero that is not finite. Waits for the device."""
    told = "finite numbers (what was quantized there was not finite); propagate=True makes it NaN"
    for argument, t in (("scales", scales), ("zeros", zeros)):
        if t is not None and not bool(t.isfinite().all()):
            at = int((~t.isfinite()).flatten().nonzero()[0])
            got = f"block {at} of {t.numel()} has one that is NaN or infinite"
            expect(False, DEQUANTIZE, argument, got, told)


def dequantize_fake(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
    dtype: torch.dtype,
    propagate: bool,
) -> torch.Tensor:
    _, shape = check_quantized(DEQUANTIZE, codes, scales, zeros, format, block)
    _check_dtype(dtype)
    return codes.new_empty(shape, dtype=dtype)


# --- Cases, floors, benchmarks --------------------------------------------------------------------

#: (shape, format, block, symmetric, seed, outer, inner)
_CASES: tuple[tuple[Any, ...], ...] = (
    ((4, 256), "int8", 128, True, None, 1, 1),
    ((3, 5, 7), "int8", 7, True, None, 1, 1),
    ((1,), "int8", 1, False, None, 1, 1),
    ((0, 64), "int8", 32, False, None, 1, 1),
    ((6, 5000), "int8", 5000, False, 5, 1, 1),
    ((2, 66), "int4", 22, True, None, 1, 1),
    ((2, 8192), "int4", 64, False, 7, 1, 1),
    ((1003 * 2,), "fp8_e4m3", 1003, True, None, 1, 1),
    ((8, 512), "fp8_e5m2", 128, True, -3, 1, 1),
    ((6, 132), "fp6_e3m2", 44, True, None, 1, 1),
    ((2, 4100), "fp6_e2m3", 4100, True, 11, 1, 1),
    ((5, 96), "fp4_e2m1", 32, True, None, 1, 1),
    ((3, 34), "fp12_e4m7", 34, True, None, 1, 1),
    ((12, 64), "fp12_e4m7", 32, True, 13, 1, 1),
    ((24, 64), "int8", 32, True, None, 4, 3),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Every format; odd, single, empty and long blocks; unaligned numbers; a swizzle; a NaN."""
    found: list[tuple[Any, ...]] = []
    for shape, name, *rest in _CASES:
        found.append((randn(device, dtype, *shape), bf.FORMATS[name].number, *rest))
    # Blocks of zeros, of tiny and huge numbers, and two that hold no number.
    odd = randn(device, dtype, 6, 128)
    odd[1], odd[2] = 0.0, odd[2] * torch.finfo(dtype).smallest_normal
    odd[3] = torch.finfo(dtype).max
    odd[4, 5], odd[5, 127] = torch.nan, -torch.inf
    found += [(odd, number, 128, True, None, 1, 1) for number in range(len(bf.FORMATS))]
    found.append((odd, 0, 64, False, None, 1, 1))
    return [*found, (unaligned(found[0][0]), *found[0][1:])]


def feedback_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found = []
    for index, (x, *rest) in enumerate(cases(device, dtype)):
        error = randn(device, torch.float32 if index % 2 else dtype, *x.shape, seed=9) / 8
        found.append((x, unaligned(error), (0.0, 0.75)[index % 3 == 0], *rest))
    return found


def dequantize_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found = []
    for x, number, block, symmetric, *_ in cases(device, dtype):
        codes, scales, zeros = reference(x, number, block, symmetric, None, 1, 1)
        given = None if symmetric else zeros
        found.append((codes, scales, given, number, block, dtype, True))
        # Bytes that quantizing never makes are read as well.
        every = torch.arange(codes.numel(), device=device).to(torch.uint8).view(codes.shape)
        known = torch.where(scales.isfinite(), scales, 2.0)
        found.append((every, known, given, number, block, dtype, False))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(4, 64, device=device)
    return [
        ("x: got torch.int64", (x.long(), 0, 32, True, None, 1, 1)),
        ("format: got 8, expected 0 to 7", (x, 8, 32, True, None, 1, 1)),
        ("block: got 0, expected 1", (x, 0, 0, True, None, 1, 1)),
        ("block: got 48, which does not divide", (x, 0, 48, True, None, 1, 1)),
        ("block: got 1, whose codes of 6 bits", (x, 4, 1, True, None, 1, 1)),
        ("symmetric: got False", (x, 2, 32, False, None, 1, 1)),
        ("swizzle: got .3, 1.", (x, 0, 32, True, None, 3, 1)),
        ("swizzle: got .0, 1.", (x, 0, 32, True, None, 0, 1)),
    ]


def feedback_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(4, 64, device=device)
    rest = (0, 32, True, None, 1, 1)
    return [
        ("error: got torch.float16", (x, x.half(), 0.0, *rest)),
        ("error: ", (x, x[:3].clone(), 0.0, *rest)),
        ("error: .*not contiguous", (x, _strided(x), 0.0, *rest)),
        ("beta: got 1", (x, x.clone(), 1.0, *rest)),
    ]


def _strided(x: torch.Tensor) -> torch.Tensor:
    return x.clone().T.contiguous().T


def dequantize_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    codes = torch.zeros(2, 64, dtype=torch.uint8, device=device)
    scales = torch.ones(2, 2, device=device)
    nan = scales.clone()
    nan[1, 0] = torch.nan
    rest = (0, 32, torch.float32, False)
    return [
        ("codes: got torch.float32", (scales, scales, None, *rest)),
        ("scales: got shape", (codes, scales[:1], None, *rest)),
        ("zeros: got shape", (codes, scales, scales[0], *rest)),
        ("scales: got torch.bfloat16", (codes, scales.bfloat16(), None, *rest)),
        ("codes: got rows of 64 bytes", (codes, scales, None, 0, 48, torch.float32, False)),
        ("dtype: got torch.int32", (codes, scales, None, 0, 32, torch.int32, False)),
        ("scales: .*block 2 of 4 has one that is NaN", (codes, nan, None, *rest)),
        ("zeros: .*block 2 of 4 has one that is NaN", (codes, scales, nan, *rest)),
    ]


def floor(x: torch.Tensor, format: int, block: int, *_: Any) -> Floor:
    return Floor(x.nbytes, _quantized_bytes(x.numel(), format, block), 2 * x.numel())


def feedback_floor(
    x: torch.Tensor, error: torch.Tensor, beta: float, format: int, block: int, *_: Any
) -> Floor:
    written = _quantized_bytes(x.numel(), format, block) + error.nbytes
    return Floor(x.nbytes + error.nbytes, written, 8 * x.numel())


def dequantize_floor(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
    dtype: torch.dtype,
    propagate: bool,
) -> Floor:
    count = scales.numel() * block
    return Floor(codes.nbytes + scales.nbytes, count * dtype.itemsize, count)


def _quantized_bytes(count: int, format: int, block: int) -> int:
    fmt = bf.format_numbered(QUANTIZE, format, True)
    return fmt.packed_bytes(count) + 4 * count // block


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """8 M numbers in blocks of 128: bf16 in every format, and the variants of int8."""
    x = randn(device, torch.bfloat16, 2048, 4096)
    found = [
        (f"8M bf16 {name}", (x, fmt.number, 128, True, None, 1, 1))
        for name, fmt in bf.FORMATS.items()
    ]
    return [
        *found,
        ("8M bf16 int8 asymmetric", (x, 0, 128, False, None, 1, 1)),
        ("8M bf16 int8 stochastic", (x, 0, 128, True, 1, 1, 1)),
        ("8M fp32 int8", (x.float(), 0, 128, True, None, 1, 1)),
    ]


def feedback_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = randn(device, torch.bfloat16, 2048, 4096)
    error = torch.zeros_like(x, dtype=torch.float32)
    return [("8M bf16 int4, fp32 error", (x, error, 0.75, 1, 128, True, None, 1, 1))]


def dequantize_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found = []
    for name, fmt in bf.FORMATS.items():
        codes = torch.randint(0, 255, (2048, fmt.packed_bytes(4096)), device=device)
        scales = torch.ones(2048, 32, device=device)
        args = (codes.to(torch.uint8), scales, None, fmt.number, 128, torch.bfloat16, False)
        found.append((f"8M bf16 {name}", args))
    return found


OPS = (
    Op(
        name=QUANTIZE,
        schema=(
            "(Tensor x, int format, int block, bool symmetric, int? seed, int outer, int inner) -> "
            "(Tensor, Tensor, Tensor)"
        ),
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
    ),
    Op(
        name=FEEDBACK,
        schema=(
            "(Tensor x, Tensor(a!) error, float beta, int format, int block, bool symmetric, "
            "int? seed, int outer, int inner) -> (Tensor, Tensor, Tensor)"
        ),
        reference=feedback_reference,
        fake=feedback_fake,
        dtypes=FLOATS,
        # In float64 a number next to a tie may get another code, and so another error.
        tolerance=EXACT,
        cases=feedback_cases,
        refused=feedback_refused,
        floor=feedback_floor,
        benchmarks=feedback_benchmarks,
    ),
    Op(
        name=DEQUANTIZE,
        schema=(
            "(Tensor codes, Tensor scales, Tensor? zeros, int format, int block, "
            "ScalarType dtype, bool propagate) -> Tensor"
        ),
        reference=dequantize_reference,
        fake=dequantize_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=dequantize_cases,
        refused=dequantize_refused,
        floor=dequantize_floor,
        benchmarks=dequantize_benchmarks,
    ),
)
