"""One product of fp8 matrices per expert, of rows sorted by expert: half the bytes of bf16.

Source: Micikevicius et al. 2022 (FP8 Formats for Deep Learning), section 3; DeepSeek-AI 2024 (V3),
section 3.3.2 (sums in fp32).
"""

from __future__ import annotations

from typing import Any

import torch

from ds_core.ops.arguments import FLOATS, expect, expect_shape, expect_together, randn, wide_dtype
from ds_core.ops.grouped_mm import ends
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME = "grouped_mm_fp8"
FP8 = torch.float8_e4m3fn


def grouped_mm_fp8(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`scale_a * (a @ b[e]) * scale_b[e]` for every expert e and its rows of a.

    Args:
        a: `[tokens, k]`, float8_e4m3fn, rows sorted by expert.
        b: `[experts, k, n]`, float8_e4m3fn; fastest where each expert's matrix is a transposed one.
        scale_a: `[tokens]`, fp32: what a row's numbers were divided by.
        scale_b: `[experts, n]`, fp32: what a column's were.
        offsets: `[experts]`, int32, the row behind each expert's last, as of `grouped_mm`. On a GPU
            their values are not looked at: of those that fall or lie outside results mean nothing.
        out_dtype: fp32, bf16 or fp16.

    Returns `[tokens, n]` of that dtype, summed in fp32; rows behind the last expert's are 0. It has
    no gradient. Raises OpError for shapes, dtypes or offsets that do not fit.
    """
    scales = (scale_a.contiguous(), scale_b.contiguous())
    out: torch.Tensor = run(NAME, a.contiguous(), b, *scales, offsets, out_dtype)
    return out


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As `grouped_mm_fp8`, of widened matrices; float64 scales make it and its result float64."""
    _check(a, b, scale_a, scale_b, offsets, out_dtype)
    dtype = scale_a.dtype
    parts, begin = [], 0
    for expert, end in enumerate(ends(NAME, offsets, len(a))):
        product = a[begin:end].to(dtype) @ b[expert].to(dtype)
        parts.append(product * scale_a[begin:end, None] * scale_b[expert])
        begin = end
    parts.append(scale_a.new_zeros(len(a) - begin, b.shape[2]))
    return torch.cat(parts).to(dtype if dtype is torch.float64 else out_dtype)


def _check(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> None:
    for argument, t in (("a", a), ("b", b)):
        expect(t.dtype == FP8, NAME, argument, t.dtype, FP8)
    expect(a.dim() == 2, NAME, "a", f"shape {list(a.shape)}", "[tokens, k]")
    fits = b.dim() == 3 and b.shape[0] >= 1 and b.shape[1] == a.shape[1]
    expect(fits, NAME, "b", f"shape {list(b.shape)}", f"[experts, {a.shape[1]}, n]")
    check_scale(NAME, "scale_a", scale_a, (len(a),), scale_a.dtype)
    check_scale(NAME, "scale_b", scale_b, (b.shape[0], b.shape[2]), scale_a.dtype)
    expect(offsets.dtype == torch.int32, NAME, "offsets", offsets.dtype, torch.int32)
    expect_shape(NAME, "offsets", offsets, (b.shape[0],))
    expect(out_dtype in FLOATS, NAME, "out_dtype", out_dtype, "fp32, bf16 or fp16")
    expect_together(NAME, a, b=b, scale_a=scale_a, scale_b=scale_b, offsets=offsets)


def check_scale(
    op: str, argument: str, scale: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Raise OpError unless a scale is fp32, or float64 for the reference, and of that shape."""
    fits = scale.dtype == dtype == wide_dtype(dtype)
    expect(fits, op, argument, scale.dtype, torch.float32)
    expect_shape(op, argument, scale, shape)


def fake(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check(a, b, scale_a, scale_b, offsets, out_dtype)
    return scale_a.new_empty((a.shape[0], b.shape[2]), dtype=out_dtype)


# --- Cases, refusals, floor -----------------------------------------------------------------------

#: Rows, k, n and the offsets.
_CASES = (
    (20, 32, 48, (5, 5, 12, 18)),
    (21, 63, 47, (0, 1, 21)),
    (70, 16, 129, (0, 66, 70, 70)),
    (1, 1, 1, (1,)),
    (3, 8, 8, (0, 0)),
    (0, 8, 8, (0, 0)),
)


def fp8(device: torch.device, *shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of all sizes that the format has, down to its least."""
    numbers = randn(torch.device("cpu"), torch.float32, *shape, seed=seed)
    return (numbers * 2.0 ** (8 * numbers.roll(1, -1)).clamp(-9, 6)).to(FP8).to(device)


def turned(b: torch.Tensor) -> torch.Tensor:
    """The same matrices, whose columns are contiguous."""
    return b.transpose(-1, -2).contiguous().transpose(-1, -2)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Few and many rows, empty experts, rows behind the last, transposed matrices, a NaN."""
    found: list[tuple[Any, ...]] = []
    for rows, k, n, listed in _CASES:
        offsets = torch.tensor(listed, dtype=torch.int32, device=device)
        scale_a = randn(device, torch.float32, rows, seed=1).exp()
        scale_b = randn(device, torch.float32, len(listed), n, seed=2).exp()
        a, b = fp8(device, rows, k), fp8(device, len(listed), k, n, seed=3)
        found.append((a, b, scale_a, scale_b, offsets, dtype))
    found += [(a, turned(b), *rest) for a, b, *rest in found[:3]]
    a, *rest = found[0]
    a = a.clone()
    a.view(torch.uint8)[3, 2], a.view(torch.uint8)[8, 0] = 0x7F, 0xFF
    return [*found, (a, *rest)]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    a, b = fp8(device, 6, 8), fp8(device, 3, 8, 4)
    row, column = torch.ones(6, device=device), torch.ones(3, 4, device=device)
    offsets = torch.tensor([2, 4, 6], dtype=torch.int32, device=device)
    out = torch.bfloat16
    found: list[tuple[str, tuple[Any, ...]]] = [
        ("a: got torch.float16", (a.half(), b, row, column, offsets, out)),
        ("b: got torch.float8_e5m2", (a, b.to(torch.float8_e5m2), row, column, offsets, out)),
        ("a: got shape", (a[0], b, row, column, offsets, out)),
        ("b: got shape", (a, b[:, :7], row, column, offsets, out)),
        ("scale_a: got torch.float16", (a, b, row.half(), column, offsets, out)),
        ("scale_a: got shape", (a, b, row[:5], column, offsets, out)),
        ("scale_b: got shape", (a, b, row, column[0], offsets, out)),
        ("offsets: got torch.int64", (a, b, row, column, offsets.long(), out)),
        ("offsets: got shape", (a, b, row, column, offsets[:2], out)),
        ("out_dtype: got torch.int8", (a, b, row, column, offsets, torch.int8)),
    ]
    if device.type == "cpu":  # on a GPU nothing waits for their values
        found.append(("offsets that never fall", (a, b, row, column, offsets.flip(0), out)))
        found.append(("none beyond the 6 rows", (a, b, row, column, offsets + 1, out)))
    return found


def floor(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> Floor:
    out = a.shape[0] * b.shape[2]
    read = a.nbytes + b.nbytes + scale_a.nbytes + scale_b.nbytes
    return Floor(read, out * out_dtype.itemsize, 2 * out * a.shape[1])


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for rows, experts, k, n in ((2048, 8, 512, 1024), (64, 32, 1024, 1024)):
        step = rows // experts
        offsets = torch.arange(step, rows + 1, step, dtype=torch.int32, device=device)
        a, b = fp8(device, rows, k), turned(fp8(device, experts, k, n))
        scales = torch.ones(rows, device=device), torch.ones(experts, n, device=device)
        label = f"{rows}x{k}x{n}/{experts} fp8"
        found.append((label, (a, b, *scales, offsets, torch.bfloat16)))
    return found


OPS = (
    Op(
        name=NAME,
        schema="(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor offsets, "
        "ScalarType out_dtype) -> Tensor",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
    ),
)
