"""Signs of numbers, eight to a byte, with one scale per chunk and error feedback.

A program takes whole chunks, and moves each byte once. A chunk that is longer is cut into parts:
their sums are added up in a fixed order, and what was left out is known only then, so that error
feedback reads x and the error a second time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import sign_pack as op
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch


@triton.jit
def _tile(chunks, chunk, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: (chunks, which of them exist, places in them)."""
    parts = tl.cdiv(chunk, BLOCK)
    row = (tl.program_id(0) // parts) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), row < chunks, column


@triton.jit
def _given(x, error, at, mask, FEEDBACK: tl.constexpr):
    """x, or x + error, in fp32."""
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if FEEDBACK:
        value += tl.load(error + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _leave(error, value, scale, at, mask):
    """Write what was left out; where the scale is NaN, the error stays as it was."""
    lost = value - tl.where(value >= 0, scale, -scale)
    tl.store(error + at, lost.to(error.dtype.element_ty), mask=mask & (scale == scale))


@triton.jit
def _bytes_of(chunk, BLOCK: tl.constexpr):
    """Of this program: places of bytes in chunks, and which of them exist."""
    part = (tl.program_id(0) % tl.cdiv(chunk, BLOCK)).to(tl.int64)
    byte = part * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    return byte, byte * 8 < chunk


@triton.jit(do_not_specialize=["chunks"])
def sign_pack_tile(
    x,
    error,
    codes,
    scales,
    sums,
    chunks,
    chunk,
    FEEDBACK: tl.constexpr,
    SQUARES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """BLOCK numbers of each of ROWS chunks; WHOLE: all of a chunk's, else its part's sum."""
    row, there, column = _tile(chunks, chunk, ROWS, BLOCK)
    mask = there[:, None] & (column < chunk)[None, :]
    at = row[:, None] * chunk + column[None, :]
    value = _given(x, error, at, mask, FEEDBACK)
    sign = tl.where(mask & (value >= 0), 1, 0)
    place = tl.arange(0, 8)[None, None, :]
    packed = tl.sum(tl.reshape(sign, (ROWS, BLOCK // 8, 8)) << place, axis=2)
    byte, inside = _bytes_of(chunk, BLOCK)
    # More than one chunk have lengths of whole bytes.
    to = codes + row[:, None] * (chunk // 8) + byte[None, :]
    tl.store(to, packed.to(tl.uint8), mask=there[:, None] & inside[None, :])
    if SQUARES:
        total = tl.sum(value * value, axis=1)
    else:
        total = tl.sum(tl.abs(value), axis=1)
    if WHOLE:
        scale = total / chunk
        if SQUARES:
            scale = tl.sqrt_rn(scale)
        scale = tl.where(scale < float("inf"), scale, float("nan"))
        tl.store(scales + row, scale, mask=there)
        if FEEDBACK:
            _leave(error, value, scale[:, None], at, mask)
    else:
        parts = tl.cdiv(chunk, BLOCK)
        tl.store(sums + row * parts + tl.program_id(0) % parts, total, mask=there)


@triton.jit(do_not_specialize=["chunks"])
def sign_error_tile(
    x, error, scales, chunks, chunk, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """The error of what `sign_pack_tile` packed, once the scales are known."""
    row, there, column = _tile(chunks, chunk, ROWS, BLOCK)
    mask = there[:, None] & (column < chunk)[None, :]
    at = row[:, None] * chunk + column[None, :]
    scale = tl.load(scales + row, mask=there, other=0.0)
    _leave(error, _given(x, error, at, mask, True), scale[:, None], at, mask)


@triton.jit(do_not_specialize=["chunks"])
def sign_unpack_tile(
    codes,
    scales,
    y,
    chunks,
    chunk,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """BLOCK numbers of each of ROWS chunks: the scale with the sign of each bit."""
    row, there, column = _tile(chunks, chunk, ROWS, BLOCK)
    byte, inside = _bytes_of(chunk, BLOCK)
    at = codes + row[:, None] * (chunk // 8) + byte[None, :]
    packed = tl.load(at, mask=there[:, None] & inside[None, :], other=0).to(tl.int32)
    # Each half of a byte beside the other, then each half of these, and of those.
    packed = tl.interleave(packed, packed >> 4)
    packed = tl.interleave(packed, packed >> 2)
    sign = tl.interleave(packed, packed >> 1) & 1
    scale = tl.load(scales + row, mask=there, other=0.0)[:, None]
    value = tl.where(sign == 1, scale, -scale)
    mask = there[:, None] & (column < chunk)[None, :]
    to = y + row[:, None] * chunk + column[None, :]
    tl.store(to, value.to(y.dtype.element_ty), mask=mask)


_CONFIGS = (
    Config({"ROWS": 8, "BLOCK": 256, "WHOLE": 1}, {"chunk": 256}),
    Config({"ROWS": 1, "BLOCK": 4096, "WHOLE": 1}, {"chunk": 4096}, warps=8),
    Config({"ROWS": 1, "BLOCK": 4096, "WHOLE": 0}, warps=8),
)
_SIZES = {"i32": "chunks", "i32:16": "chunk"}
_PACK = Kernel(
    sign_pack_tile,
    _CONFIGS,
    types(
        {"*bf16": "x", "*fp32": "error scales sums", "*u8": "codes", **_SIZES},
        FEEDBACK=True,
        SQUARES=True,
    ),
)
_ERROR = Kernel(
    sign_error_tile, _CONFIGS[2:], types({"*bf16": "x", "*fp32": "error scales", **_SIZES})
)
_UNPACK = Kernel(
    sign_unpack_tile, _CONFIGS, types({"*u8": "codes", "*fp32": "scales", "*bf16": "y", **_SIZES})
)
KERNELS = (_PACK, _ERROR, _UNPACK)


def sign_pack(x: torch.Tensor, chunk: int, squares: bool) -> op.Pair:
    """As `ds_core.ops.sign_pack.reference`."""
    results = op.fake(x, chunk, squares)
    expect_plain(op.PACK, x=x)
    return _pack(op.PACK, x, None, squares, results)


def sign_pack_feedback_(x: torch.Tensor, error: torch.Tensor, chunk: int, squares: bool) -> op.Pair:
    """As `ds_core.ops.sign_pack.feedback_reference`."""
    results = op.feedback_fake(x, error, chunk, squares)
    expect_plain(op.FEEDBACK, x=x, error=error)
    return _pack(op.FEEDBACK, x, error, squares, results)


def _pack(
    name: str, x: torch.Tensor, error: torch.Tensor | None, squares: bool, results: op.Pair
) -> op.Pair:
    codes, scales = results
    chunks = len(scales)
    if chunks == 0:
        return results
    chunk = x.numel() // chunks
    config = _PACK.config(name, x.device, chunk=chunk)
    rows, width, whole = (config.constants[each] for each in ("ROWS", "BLOCK", "WHOLE"))
    parts = blocks(chunk, width)
    sums = scales if whole else scales.new_empty(chunks, parts)
    launch(
        *(_PACK, config, (blocks(chunks, rows) * parts,)),
        *(x, scales if error is None else error, codes, scales, sums, chunks, chunk),
        FEEDBACK=error is not None,
        SQUARES=squares,
    )
    if whole:
        return results
    mean = sums.sum(1, dtype=torch.float64) / chunk
    scales = ((mean.sqrt() if squares else mean) + mean * 0.0).float()  # infinity becomes NaN
    if error is not None:
        launch(_ERROR, config, (chunks * parts,), x, error, scales, chunks, chunk)
    return codes, scales


def sign_unpack(
    codes: torch.Tensor, scales: torch.Tensor, numel: int, dtype: torch.dtype
) -> torch.Tensor:
    """As `ds_core.ops.sign_pack.unpack_reference`."""
    y = op.unpack_fake(codes, scales, numel, dtype)
    expect_plain(op.UNPACK, codes=codes, scales=scales, y=y)
    chunks = len(scales)
    chunk = numel // chunks if chunks else 0
    config = _UNPACK.config(op.UNPACK, codes.device, chunk=chunk)
    rows, width = config.constants["ROWS"], config.constants["BLOCK"]
    grid = (blocks(chunks, rows) * blocks(chunk, width),)
    launch(_UNPACK, config, grid, codes, scales, y, chunks, chunk)
    return y
