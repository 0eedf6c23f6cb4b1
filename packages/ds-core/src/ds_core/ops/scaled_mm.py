"""The product of two fp8 matrices with scales. Source: Micikevicius et al. 2022, section 3."""

from __future__ import annotations

from typing import Any

import torch

from ds_core.ops.arguments import FLOATS, compact, expect, expect_shape, expect_together, randn
from ds_core.ops.grouped_mm_fp8 import FP8, check_scale, fp8, turned
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME = "scaled_mm"


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`scale_a * (a @ b) * scale_b + bias`.

    Args:
        a: `[m, k]`, float8_e4m3fn.
        b: `[k, n]`, float8_e4m3fn; fastest if it is a transposed matrix.
        scale_a: what a's numbers were divided by, fp32: one, or one for each row, of any shape.
        scale_b: what b's were: one, or one for each column.
        bias: `[n]`, of out_dtype, or None.
        out_dtype: fp32, bf16 or fp16.

    Returns `[m, n]` of that dtype, summed in fp32. It has no gradient.
    Raises OpError for shapes or dtypes that do not fit.
    """
    scales = (scale_a.reshape(-1), scale_b.reshape(-1))
    out: torch.Tensor = run(NAME, a.contiguous(), b, *scales, compact(bias), out_dtype)
    return out


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As `scaled_mm`, of widened matrices; float64 scales make it and its result float64."""
    check(a, b, scale_a, scale_b, bias, out_dtype)
    dtype = scale_a.dtype
    out = (a.to(dtype) @ b.to(dtype)) * scale_a[:, None] * scale_b
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(dtype if dtype is torch.float64 else out_dtype)


def check(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Raise OpError unless dtypes, shapes and devices fit."""
    for argument, t in (("a", a), ("b", b)):
        expect(t.dtype == FP8, NAME, argument, t.dtype, FP8)
    expect(a.dim() == 2, NAME, "a", f"shape {list(a.shape)}", "[m, k]")
    fits = b.dim() == 2 and b.shape[0] == a.shape[1]
    expect(fits, NAME, "b", f"shape {list(b.shape)}", f"[{a.shape[1]}, n]")
    for argument, scale, many in (("scale_a", scale_a, len(a)), ("scale_b", scale_b, b.shape[1])):
        one = scale.dim() == 1 and len(scale) == 1
        check_scale(NAME, argument, scale, (1 if one else many,), scale_a.dtype)
    expect(out_dtype in FLOATS, NAME, "out_dtype", out_dtype, "fp32, bf16 or fp16")
    if bias is not None:
        expect_shape(NAME, "bias", bias, (b.shape[1],))
        exact = bias.dtype == torch.float64 and scale_a.dtype == torch.float64
        expect(exact or bias.dtype == out_dtype, NAME, "bias", bias.dtype, out_dtype)
    expect_together(NAME, a, b=b, scale_a=scale_a, scale_b=scale_b, bias=bias)


def fake(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    check(a, b, scale_a, scale_b, bias, out_dtype)
    return scale_a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


# --- Cases, refusals, floor -----------------------------------------------------------------------

#: m, k, n, whether scales of a and b are of each row or column, whether there is a bias.
_CASES = (
    (17, 32, 48, True, True, True),
    (33, 63, 47, False, False, False),
    (64, 80, 16, False, True, True),
    (1, 1, 1, True, False, False),
    (5, 16, 129, True, True, False),
    (0, 8, 8, True, True, True),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd, single and empty sizes, scales of tensors and rows, with and without a bias."""
    found: list[tuple[Any, ...]] = []
    for index, (m, k, n, by_row, by_column, biased) in enumerate(_CASES):
        scale_a = randn(device, torch.float32, m if by_row else 1, seed=1).exp()
        scale_b = randn(device, torch.float32, n if by_column else 1, seed=2).exp()
        bias = randn(device, dtype, n) if biased else None
        b = fp8(device, k, n, seed=3)
        b = b if index % 2 else turned(b)
        found.append((fp8(device, m, k), b, scale_a, scale_b, bias, dtype))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    a, b, one = fp8(device, 6, 8), fp8(device, 8, 4), torch.ones(1, device=device)
    out = torch.bfloat16
    return [
        ("a: got torch.float16", (a.half(), b, one, one, None, out)),
        ("b: got torch.float8_e5m2", (a, b.to(torch.float8_e5m2), one, one, None, out)),
        ("a: got shape", (a[0], b, one, one, None, out)),
        ("b: got shape", (a, b[:7], one, one, None, out)),
        ("scale_a: got torch.float16", (a, b, one.half(), one, None, out)),
        ("scale_a: got shape", (a, b, one.expand(5), one, None, out)),
        ("scale_b: got shape", (a, b, one, one.expand(6), None, out)),
        ("bias: got shape", (a, b, one, one, one.bfloat16(), out)),
        ("bias: got torch.float32", (a, b, one, one, one.expand(4), out)),
        ("out_dtype: got torch.int8", (a, b, one, one, None, torch.int8)),
    ]


def floor(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> Floor:
    out = a.shape[0] * b.shape[1]
    read = sum(t.nbytes for t in (a, b, scale_a, scale_b, bias) if t is not None)
    return Floor(read, out * out_dtype.itemsize, 2 * out * a.shape[1])


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    a, b = fp8(device, 512, 1024), turned(fp8(device, 1024, 1024))
    one = torch.ones(1, device=device)
    return [("512x1024x1024 fp8", (a, b, one, one, None, torch.bfloat16))]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, "
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
