"""The sum of several ranks' quantized numbers, quantized again, in one pass.

Source: ZeRO++ (Wang et al. 2023, section 3.3), what each rank does between the two all-to-alls of
its quantized gradient reduction.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from ds_core.ops import block_format as bf
from ds_core.ops import quantize as q
from ds_core.ops.arguments import FLOATS, expect, randn, unaligned
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS, EXACT
from ds_core.seams.op import Floor, Op

NAME = "quantized_reduce"
FEEDBACK = "quantized_reduce_feedback_"


def quantized_reduce(
    pieces: q.Quantized,
    *,
    mean: bool = False,
    format: q.Format | None = None,
    symmetric: bool | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int | None = None,
    error: torch.Tensor | None = None,
    beta: float = 0.0,
) -> q.Quantized:
    """The sum (or mean) over ranks of `pieces`, quantized; no fp32 copy of the pieces is made.

    Numbers are added in fp32 in the order of ranks, so that the result is the same bit for bit on
    any device. A block that has a scale of NaN on any rank gets the scale NaN.

    Args:
        pieces: codes `[ranks, ..., bytes]` and scales `[ranks, ..., d / block]`, contiguous, such
            as an all-to-all leaves them.
        mean: divide by the number of ranks.
        format, symmetric: of the result; None: as the pieces.
        rounding, seed: as of `quantize`.
        error, beta: as of `quantize`: `[..., d]`, fp32, added to the sum, changed in place.

    Returns `[..., d]` with the same block. Raises OpError for what does not fit.
    """
    fmt = bf.format_named(NAME, pieces.format)
    to = bf.format_named(NAME, format or pieces.format)
    to_symmetric = pieces.zeros is None if symmetric is None else symmetric
    drawn = q.drawn_seed(NAME, rounding, seed)
    given = (pieces.codes, pieces.scales, pieces.zeros)
    rest = (fmt.number, pieces.block, mean, to.number, to_symmetric, drawn)
    if error is None:
        codes, scales, zeros = run(NAME, *given, *rest)
    else:
        codes, scales, zeros = run(FEEDBACK, *given, error, float(beta), *rest)
    kept = None if to_symmetric else zeros
    return q.Quantized(codes, scales, kept, to.name, pieces.block, pieces.dtype)


def reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
    mean: bool,
    to_format: int,
    to_symmetric: bool,
    seed: int | None,
) -> q.Results:
    """(codes, scales, zeros) of the sum over the first dimension, as of `quantized_reduce`."""
    to, shape = _check(NAME, codes, scales, zeros, format, block, to_format, to_symmetric)
    total = _sum(codes, scales, zeros, format, block, mean)
    return q.shaped(q.encoded(total, to, to_symmetric, seed), shape, to, block, to_symmetric)


def feedback_reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    error: torch.Tensor,
    beta: float,
    format: int,
    block: int,
    mean: bool,
    to_format: int,
    to_symmetric: bool,
    seed: int | None,
) -> q.Results:
    """The same of the sum + `error`, and `error` in place."""
    to, shape = _check(FEEDBACK, codes, scales, zeros, format, block, to_format, to_symmetric)
    q.check_error(FEEDBACK, error, beta, shape, scales.dtype, codes.device)
    total = _sum(codes, scales, zeros, format, block, mean)
    total = total + error.to(total.dtype).view_as(total)
    made = q.encoded(total, to, to_symmetric, seed)
    q.update_error(error, beta, total, *made, to, to_symmetric)
    return q.shaped(made, shape, to, block, to_symmetric)


def _sum(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
    mean: bool,
) -> torch.Tensor:
    """`[blocks, block]`, added in the order of ranks."""
    fmt = bf.format_numbered(NAME, format, zeros is None)
    rows = q.decoded(codes, scales, zeros, fmt, block)
    ranks = rows.view(len(codes), len(rows) // len(codes), block)
    total = ranks[0].clone()
    for piece in ranks[1:]:
        total += piece
    return total * (1.0 / len(codes)) if mean else total


def _check(
    op: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
    to_format: int,
    to_symmetric: bool,
) -> tuple[bf.BlockFormat, torch.Size]:
    """The format and shape of the result."""
    _, shape = q.check_quantized(op, codes, scales, zeros, format, block)
    fits = codes.dim() >= 2 and len(codes) >= 1
    told = "[ranks, ..., bytes] of one rank or more"
    expect(fits, op, "codes", f"shape {list(codes.shape)}", told)
    to = bf.format_numbered(op, to_format, to_symmetric)
    bf.check_block(op, block, shape[-1], to)
    return to, shape[1:]


def fake(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
    mean: bool,
    to_format: int,
    to_symmetric: bool,
    seed: int | None,
) -> q.Results:
    to, shape = _check(NAME, codes, scales, zeros, format, block, to_format, to_symmetric)
    return q.empty_results(scales, shape, to, block, to_symmetric)


def feedback_fake(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    error: torch.Tensor,
    beta: float,
    format: int,
    block: int,
    mean: bool,
    to_format: int,
    to_symmetric: bool,
    seed: int | None,
) -> q.Results:
    to, shape = _check(FEEDBACK, codes, scales, zeros, format, block, to_format, to_symmetric)
    q.check_error(FEEDBACK, error, beta, shape, scales.dtype, codes.device)
    return q.empty_results(scales, shape, to, block, to_symmetric)


# --- Cases, floors, benchmarks --------------------------------------------------------------------

#: (shape, format, block, symmetric, mean, result's format, symmetric, seed)
_CASES: tuple[tuple[Any, ...], ...] = (
    ((4, 256), "int8", 128, True, False, "int8", True, None),
    ((1, 2, 14), "int8", 7, False, True, "int8", True, None),
    ((3, 8192), "int4", 64, True, True, "int8", False, 3),
    ((2, 3, 4100), "int4", 4100, False, False, "int4", False, None),
    ((5, 96), "fp6_e3m2", 32, True, True, "fp6_e3m2", True, 4),
    ((2, 0, 32), "fp12_e4m7", 32, True, False, "fp8_e4m3", True, None),
    ((3, 2, 66), "fp12_e4m7", 22, True, False, "fp8_e5m2", True, None),
)


def _made(
    device: torch.device, dtype: torch.dtype, shape: Any, name: str, block: int, symmetric: bool
) -> tuple[Any, ...]:
    x = randn(device, dtype, *shape)
    number = bf.FORMATS[name].number
    codes, scales, zeros = q.reference(x, number, block, symmetric, None, 1, 1)
    return codes, scales, None if symmetric else zeros


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """One to five ranks, formats alike and different, odd, long and empty blocks, a NaN."""
    found = []
    for shape, name, block, symmetric, mean, to, to_symmetric, seed in _CASES:
        made = _made(device, dtype, shape, name, block, symmetric)
        rest = (bf.FORMATS[name].number, block, mean, bf.FORMATS[to].number, to_symmetric, seed)
        found.append((*made, *rest))
    codes, scales, *others = found[0]
    scales = scales.clone()
    scales[1, 1] = torch.nan
    return [*found, (unaligned(codes), unaligned(scales), *others)]


def feedback_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found = []
    for index, (codes, scales, zeros, number, block, *rest) in enumerate(cases(device, dtype)):
        shape = (*scales.shape[1:-1], scales.shape[-1] * block)
        error = randn(device, torch.float32, *shape, seed=9) / 8
        beta = 0.75 if index % 2 else 0.0
        found.append((codes, scales, zeros, error, beta, number, block, *rest))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    codes = torch.zeros(2, 64, dtype=torch.uint8, device=device)
    scales = torch.ones(2, 2, device=device)
    return [
        ("codes: got torch.float32", (scales, scales, None, 0, 32, False, 0, True, None)),
        ("codes: got shape .64.", (codes[0], scales[0], None, 0, 32, False, 0, True, None)),
        ("codes: got shape .0, 64.", (codes[:0], scales[:0], None, 0, 32, False, 0, True, None)),
        ("scales: got shape", (codes, scales[:1], None, 0, 32, False, 0, True, None)),
        ("format: got 99", (codes, scales, None, 0, 32, False, 99, True, None)),
        ("symmetric: got False", (codes, scales, None, 0, 32, False, 3, False, None)),
    ]


def feedback_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    codes = torch.zeros(2, 64, dtype=torch.uint8, device=device)
    scales, error = torch.ones(2, 2, device=device), torch.zeros(64, device=device)
    rest = (0, 32, False, 0, True, None)
    return [
        ("error: ", (codes, scales, None, error[:32].clone(), 0.0, *rest)),
        ("error: got torch.bfloat16", (codes, scales, None, error.bfloat16(), 0.0, *rest)),
        ("beta: got -0.5", (codes, scales, None, error, -0.5, *rest)),
    ]


def floor(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: int,
    block: int,
    mean: bool,
    to_format: int,
    *_: Any,
) -> Floor:
    count = scales.numel() * block
    to = bf.format_numbered(NAME, to_format, True)
    written = (to.packed_bytes(count) + scales.nbytes) // len(codes)
    return Floor(codes.nbytes + scales.nbytes, written, 2 * count)


def feedback_floor(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    error: torch.Tensor,
    beta: float,
    *rest: Any,
) -> Floor:
    found = floor(codes, scales, zeros, *rest)
    read, written = found.read_bytes + error.nbytes, found.written_bytes + error.nbytes
    return Floor(read, written, found.flops)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found = []
    for name in ("int8", "int4"):
        fmt = bf.FORMATS[name]
        codes = torch.randint(0, 255, (8, 2048, fmt.packed_bytes(1024)), device=device)
        scales = torch.ones(8, 2048, 8, device=device)
        rest = (fmt.number, 128, True, fmt.number, True, None)
        found.append((f"8x2M {name}", (codes.to(torch.uint8), scales, None, *rest)))
    return found


def feedback_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    error = torch.zeros(2048, 1024, device=device)
    return [(label, (*args[:3], error, 0.75, *args[3:])) for label, args in benchmarks(device)[1:]]


OPS = (
    Op(
        name=NAME,
        schema=(
            "(Tensor codes, Tensor scales, Tensor? zeros, int format, int block, bool mean, "
            "int to_format, bool to_symmetric, int? seed) -> (Tensor, Tensor, Tensor)"
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
            "(Tensor codes, Tensor scales, Tensor? zeros, Tensor(a!) error, float beta, "
            "int format, int block, bool mean, int to_format, bool to_symmetric, int? seed) -> "
            "(Tensor, Tensor, Tensor)"
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
)
