"""One bit per number: its sign, eight to a byte, with one scale per chunk and error feedback.

Source: 1-bit Adam (Tang et al. 2021, section 5); Karimireddy et al. 2019 for the scale mean |x|.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

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
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

PACK = "sign_pack"
FEEDBACK = "sign_pack_feedback_"
UNPACK = "sign_unpack"

Pair = tuple[torch.Tensor, torch.Tensor]


def sign_pack(
    x: torch.Tensor,
    *,
    error: torch.Tensor | None = None,
    chunk: int | None = None,
    scale: Literal["mean", "rms"] = "mean",
) -> Pair:
    """(signs, scales) of `x`: what `sign_unpack` makes `+scale` and `-scale` of.

    Args:
        x: any shape, fp32, bf16 or fp16, contiguous.
        error: x's shape, fp32 or x's dtype, changed in place: what earlier calls left out. It is
            added to x, and becomes `x + error - unpacked`.
        chunk: numbers per scale, a multiple of 8 that divides x.numel(); None: all of them.
        scale: "mean" of |x|, with which error feedback always converges; "rms", `||x||_2 /
            sqrt(n)`, is what DeepSpeed's 1-bit Adam uses.

    Returns:
        uint8 `[ceil(numel / 8)]`, the first sign in the lowest bit, 1 for x >= 0; and fp32
        `[numel / chunk]`, NaN for a chunk that is not finite, whose error stays as it was.

    Raises OpError (RuntimeError, in C++) for what does not fit.
    """
    expect(scale in ("mean", "rms"), PACK, "scale", scale, '"mean" or "rms"')
    expect(chunk is None or chunk >= 1, PACK, "chunk", chunk, "1 or more, or None")
    rest = (chunk or 0, scale == "rms")
    made: Pair = run(PACK, x, *rest) if error is None else run(FEEDBACK, x, error, *rest)
    return made


def sign_unpack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    shape: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Numbers of that shape and dtype: each chunk's scale with the signs that were packed.

    codes: `[ceil(numel / 8)]` uint8; scales: `[chunks]` fp32. A scale of NaN makes its chunk NaN.
    Raises OpError (RuntimeError, in C++) for what does not fit together.
    """
    sizes = torch.Size((shape,) if isinstance(shape, int) else shape)
    flat: torch.Tensor = run(UNPACK, codes, scales, sizes.numel(), dtype)
    return flat.view(sizes)


def reference(x: torch.Tensor, chunk: int, squares: bool) -> Pair:
    """(signs, scales) as of `sign_pack`; chunk 0: all."""
    rows = _rows(PACK, x, chunk)
    return _codes(rows), _scales(rows, squares)


def feedback_reference(x: torch.Tensor, error: torch.Tensor, chunk: int, squares: bool) -> Pair:
    """The same of `x + error`, and `error` in place as `sign_pack` says."""
    rows = _rows(FEEDBACK, x, chunk)
    _check_error(error, x)
    old = error.to(rows.dtype).view_as(rows)
    rows = rows + old
    scales = _scales(rows, squares)
    lost = rows - torch.where(rows >= 0, scales[:, None], -scales[:, None])
    error.copy_(torch.where(scales.isfinite()[:, None], lost, old).view_as(error))
    return _codes(rows), scales


def unpack_reference(
    codes: torch.Tensor, scales: torch.Tensor, numel: int, dtype: torch.dtype
) -> torch.Tensor:
    """As `sign_unpack`, `[numel]`."""
    _check_packed(codes, scales, numel, dtype)
    bits = (codes[:, None] >> torch.arange(8, device=codes.device)) & 1
    rows = bits.flatten()[:numel].view(len(scales), numel // max(len(scales), 1))
    return torch.where(rows == 1, scales[:, None], -scales[:, None]).flatten().to(dtype)


def _codes(rows: torch.Tensor) -> torch.Tensor:
    flat = rows.flatten() >= 0
    padded = torch.nn.functional.pad(flat.int(), (0, -len(flat) % 8)).view(-1, 8)
    places = torch.arange(8, device=rows.device, dtype=torch.int32)
    return (padded << places).sum(1).to(torch.uint8)


def _scales(rows: torch.Tensor, squares: bool) -> torch.Tensor:
    found = rows.square().mean(1).sqrt() if squares else rows.abs().mean(1)
    return torch.where(found.isfinite(), found, torch.nan)


def _rows(op: str, x: torch.Tensor, chunk: int) -> torch.Tensor:
    """`[chunks, chunk]`, wide."""
    expect_float(op, "x", x)
    chunks = _num_chunks(op, x.numel(), chunk)
    return wide(x).reshape(chunks, x.numel() // max(chunks, 1))


def _num_chunks(op: str, numel: int, chunk: int) -> int:
    expect(chunk >= 0, op, "chunk", chunk, "0 or more")
    if numel == 0:
        return 0
    length = chunk or numel
    expect(numel % length == 0, op, "chunk", chunk, f"a divisor of the {numel} elements")
    whole = length == numel or length % 8 == 0
    expect(whole, op, "chunk", chunk, "a multiple of 8, whose signs fill whole bytes")
    return numel // length


def _check_error(error: torch.Tensor, x: torch.Tensor) -> None:
    allowed = error.dtype in (torch.float32, x.dtype)
    expect(allowed, FEEDBACK, "error", error.dtype, f"torch.float32 or {x.dtype}")
    expect_shape(FEEDBACK, "error", error, x.shape)
    expect(error.is_contiguous(), FEEDBACK, "error", "not contiguous", "contiguous")
    expect_together(FEEDBACK, x, error=error)


def _check_packed(
    codes: torch.Tensor, scales: torch.Tensor, numel: int, dtype: torch.dtype
) -> None:
    expect(codes.dtype is torch.uint8, UNPACK, "codes", codes.dtype, torch.uint8)
    is_fp32 = scales.dtype in (torch.float32, torch.float64)
    expect(is_fp32, UNPACK, "scales", scales.dtype, torch.float32)
    expect(numel >= 0, UNPACK, "numel", numel, "0 or more")
    expect_shape(UNPACK, "codes", codes, (-(-numel // 8),))
    chunks = len(scales) if scales.dim() == 1 else -1
    fits = chunks >= 0 and (numel % chunks == 0 if chunks else numel == 0)
    told = f"one number per chunk of {numel} numbers in all"
    expect(fits, UNPACK, "scales", f"shape {list(scales.shape)}", told)
    _num_chunks(UNPACK, numel, numel // chunks if chunks else 0)
    expect(dtype in (*FLOATS, torch.float64), UNPACK, "dtype", dtype, "a float dtype")
    expect_together(UNPACK, codes, scales=scales)


def fake(x: torch.Tensor, chunk: int, squares: bool) -> Pair:
    expect_float(PACK, "x", x)
    return _empty(x, _num_chunks(PACK, x.numel(), chunk))


def feedback_fake(x: torch.Tensor, error: torch.Tensor, chunk: int, squares: bool) -> Pair:
    expect_float(FEEDBACK, "x", x)
    _check_error(error, x)
    return _empty(x, _num_chunks(FEEDBACK, x.numel(), chunk))


def _empty(x: torch.Tensor, chunks: int) -> Pair:
    codes = x.new_empty(-(-x.numel() // 8), dtype=torch.uint8)
    return codes, x.new_empty(chunks, dtype=wide_dtype(x.dtype))


def unpack_fake(
    codes: torch.Tensor, scales: torch.Tensor, numel: int, dtype: torch.dtype
) -> torch.Tensor:
    _check_packed(codes, scales, numel, dtype)
    return codes.new_empty(numel, dtype=dtype)


# --- Cases, floors, benchmarks --------------------------------------------------------------------

_CASES = (
    ((4, 256), 0, False),
    ((4, 256), 128, True),
    ((3, 67), 0, True),
    ((1,), 0, False),
    ((0, 8), 0, False),
    ((2, 20000), 20000, False),
    ((16, 8), 8, False),
    ((70001,), 0, True),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """One chunk and many, odd, single, empty and long ones; zeros, an overflow; unaligned."""
    found: list[tuple[Any, ...]] = []
    for shape, chunk, squares in _CASES:
        found.append((randn(device, dtype, *shape), chunk, squares))
    odd = randn(device, dtype, 4, 64)
    odd[0], odd[1, ::2], odd[2, 7], odd[3, 1] = 0.0, -0.0, torch.inf, torch.nan
    return [*found, (odd, 64, False), (odd, 64, True), (unaligned(found[2][0]), 0, False)]


def feedback_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found = []
    for index, (x, *rest) in enumerate(cases(device, dtype)):
        error = randn(device, torch.float32 if index % 2 else dtype, *x.shape, seed=9) / 8
        found.append((x, unaligned(error), *rest))
    return found


def unpack_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for x, *rest in cases(device, dtype):
        codes, scales = reference(x, *rest)
        found.append((codes, scales, x.numel(), dtype))
    codes, scales, *rest = found[1]
    return [*found, (unaligned(codes), unaligned(scales), *rest)]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(4, 64, device=device)
    return [
        ("x: got torch.int64", (x.long(), 0, False)),
        ("chunk: got 100", (x, 100, False)),
        ("chunk: got 4, expected a multiple of 8", (x, 4, False)),
        ("chunk: got -8", (x, -8, False)),
    ]


def feedback_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(4, 64, device=device)
    return [
        ("error: got torch.float16", (x, x.half(), 0, False)),
        ("error: ", (x, x[:3].clone(), 0, False)),
    ]


def unpack_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    codes = torch.zeros(8, dtype=torch.uint8, device=device)
    scales = torch.ones(4, device=device)
    return [
        ("codes: got torch.float32", (scales, scales, 32, torch.float32)),
        ("codes: got shape .8., expected .9.", (codes, scales, 72, torch.float32)),
        ("scales: got shape .4.", (codes, scales, 63, torch.float32)),
        ("scales: got torch.float16", (codes, scales.half(), 64, torch.float32)),
        ("chunk: got 20", (codes[:5], scales[:2], 40, torch.float32)),
        ("dtype: got torch.int8", (codes, scales, 64, torch.int8)),
    ]


def floor(x: torch.Tensor, *_: Any) -> Floor:
    return Floor(x.nbytes, x.numel() // 8, 2 * x.numel())


def feedback_floor(x: torch.Tensor, error: torch.Tensor, *_: Any) -> Floor:
    """One pass, as if x and error could be kept until the scale is known."""
    return Floor(x.nbytes + error.nbytes, error.nbytes + x.numel() // 8, 4 * x.numel())


def unpack_floor(codes: torch.Tensor, scales: torch.Tensor, numel: int, dtype: Any) -> Floor:
    return Floor(codes.nbytes + scales.nbytes, numel * dtype.itemsize, numel)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [("4M fp32", (randn(device, torch.float32, 1 << 22), 0, False))]


def feedback_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = randn(device, torch.float32, 1 << 22)
    return [
        ("4M fp32 one scale", (x, torch.zeros_like(x), 0, True)),
        ("4M fp32 chunks of 4096", (x, torch.zeros_like(x), 4096, True)),
    ]


def unpack_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    codes = torch.randint(0, 255, (1 << 19,), device=device).to(torch.uint8)
    return [("4M fp32", (codes, torch.ones(1, device=device), 1 << 22, torch.float32))]


OPS = (
    Op(
        name=PACK,
        schema="(Tensor x, int chunk, bool squares) -> (Tensor, Tensor)",
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
        schema="(Tensor x, Tensor(a!) error, int chunk, bool squares) -> (Tensor, Tensor)",
        reference=feedback_reference,
        fake=feedback_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=feedback_cases,
        refused=feedback_refused,
        floor=feedback_floor,
        benchmarks=feedback_benchmarks,
    ),
    Op(
        name=UNPACK,
        schema="(Tensor codes, Tensor scales, int numel, ScalarType dtype) -> Tensor",
        reference=unpack_reference,
        fake=unpack_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=unpack_cases,
        refused=unpack_refused,
        floor=unpack_floor,
        benchmarks=unpack_benchmarks,
    ),
)
