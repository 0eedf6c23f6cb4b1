"""Numbers as they come back from a quantization, for training that shall bear one.

Sources: Jacob et al. 2018, section 3 (quantization in training); Bengio et al. 2013 (the gradient
passes as if nothing had been rounded); Choi et al. 2018 (PACT: not where a range cuts a number
off); Li et al. 2016, section 2 (ternary weights); Rastegari et al. 2016, section 3.1 (binary).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_together,
    randn,
    unaligned,
    wide,
)
from ds_core.ops.block_format import LEAST_SCALE, uniform
from ds_core.ops.quantize import drawn_seed
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS, EXACT
from ds_core.seams.op import Autograd, Floor, Op

NAME = "fake_quantize"
SIGNS = "fake_quantize_signs"

#: Integers of fp32 are exact far beyond these.
MOST_BITS = 16
#: Of the mean |x|: what a ternary number must exceed (Li et al. 2016, equation 6).
TERNARY_THRESHOLD = 0.7


def fake_quantize(
    x: torch.Tensor,
    bits: int = 8,
    *,
    groups: int = 1,
    scheme: Literal["symmetric", "asymmetric", "ternary", "binary"] = "symmetric",
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int | None = None,
    limits: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x` rounded to `2^bits` numbers per group, in its own dtype; the gradient passes straight.

    symmetric:  `scale * clamp(round(x / scale), -n, n)`, n = 2^(bits - 1) - 1, scale = max |x| / n
    asymmetric: `low + scale * clamp(round((x - low) / scale), 0, n)`, n = 2^bits - 1,
                scale = (high - low) / n, from the least to the largest number
    ternary:    `a * sign(x)` where |x| > 0.7 * mean |x|, else 0; a: the mean |x| of the former
    binary:     `mean |x| * sign(x)`, the sign of 0 being 1

    At 8 and 4 bits the first two are what `quantize` and `dequantize` make of groups as blocks.
    Without limits nothing is cut off, and the gradient of the result is that of x, unchanged.

    Args:
        x: any shape, fp32, bf16 or fp16, contiguous.
        bits: 2 to 16; "ternary" has 2, "binary" 1.
        groups: equal parts of x in memory, each with a scale of its own: 1 for one scale,
            `len(x)` for one per row of a matrix, `x.numel() // x.shape[-1]` for one per token.
        rounding: "stochastic" rounds up with the probability of the fraction, so that the mean of
            many draws is x (within the limits); symmetric and asymmetric only.
        seed: of the stochastic rounding, as of `quantize`.
        limits: `[2]` or `[groups, 2]`, fp32: the least and the largest number, known beforehand
            (a running average of an activation's); None: those of x. symmetric: the larger of
            both magnitudes counts. What lies outside becomes the nearest that lies inside, and its
            gradient 0. They have no gradient. symmetric and asymmetric only.

    Returns x's shape and dtype. A group that holds a NaN or infinity becomes NaN, so that no
    overflow is hidden; with limits, a NaN stays one, and a group whose limits are not finite, or
    not in order, becomes NaN.

    Raises OpError for what does not fit.
    """
    named = ("symmetric", "asymmetric", "ternary", "binary")
    expect(scheme in named, NAME, "scheme", scheme, f"one of {', '.join(named)}")
    drawn = drawn_seed(NAME, rounding, seed)
    if scheme in ("symmetric", "asymmetric"):
        result: torch.Tensor = run(NAME, x, limits, bits, groups, scheme == "symmetric", drawn)
        return result
    only = "symmetric and asymmetric only"
    expect(rounding == "nearest", NAME, "rounding", rounding, f"nearest; others are for {only}")
    expect(limits is None, NAME, "limits", "a tensor", f"None; they are for {only}")
    own = 2 if scheme == "ternary" else 1
    expect(bits == own, NAME, "bits", bits, f'{own} for scheme="{scheme}"')
    signs: torch.Tensor = run(SIGNS, x, groups, scheme == "ternary")
    return signs


# --- Uniform steps --------------------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    limits: torch.Tensor | None,
    bits: int,
    groups: int,
    symmetric: bool,
    seed: int | None,
) -> torch.Tensor:
    """As `fake_quantize`, symmetric or not; seed None: to the nearest."""
    _check(x, limits, bits, groups)
    rows = wide(x).reshape(groups, x.numel() // groups)
    if rows.numel() == 0:
        return x.clone()
    low, high = range_of(rows, limits)
    scale, zero = scale_of(low, high, bits, symmetric)
    values = (rows - zero) * (1.0 / scale)
    if seed is None:
        numbers = values.round()
    else:
        floor = values.floor()
        chance = uniform(seed, *rows.shape, device=x.device)
        numbers = floor + (chance < values - floor)
    most = largest(bits, symmetric)
    numbers = numbers.clamp(-most if symmetric else 0, most)
    values = numbers * scale + zero
    if limits is not None:
        bound = torch.maximum(low.abs(), high.abs())
        rows = rows.clamp(-bound, bound) if symmetric else rows.clamp(low, high)
    return _straight(values, rows).to(x.dtype).view(x.shape)


def _straight(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Values with the gradient of rows, for who differentiates the reference itself."""
    return values.detach() + (rows - rows.detach()) if rows.requires_grad else values


def range_of(rows: torch.Tensor, limits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(the least, the largest number) of each group, `[groups, 1]` in the dtype of rows."""
    if limits is None:
        low, high = rows.aminmax(dim=1, keepdim=True)
        return low, high
    pairs = limits.detach().to(rows.dtype).expand(len(rows), 2)
    return pairs[:, :1], pairs[:, 1:]


def scale_of(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) of groups; the scale is NaN if the range is none."""
    extent = torch.maximum(low.abs(), high.abs()) if symmetric else high - low
    known = low.isfinite() & high.isfinite() & extent.isfinite() & (high >= low)
    # A product, not a quotient: it is rounded alike on every device.
    scale = (extent * (1.0 / largest(bits, symmetric))).clamp(min=LEAST_SCALE)
    zero = torch.zeros_like(low) if symmetric else low
    return torch.where(known, scale, torch.nan), zero


def largest(bits: int, symmetric: bool) -> int:
    """The largest code; the least is as far below 0, or 0."""
    return int((1 << (bits - symmetric)) - 1)


def _check(x: torch.Tensor, limits: torch.Tensor | None, bits: int, groups: int) -> None:
    expect(2 <= bits <= MOST_BITS, NAME, "bits", bits, f"2 to {MOST_BITS}")
    _check_groups(NAME, x, groups)
    if limits is not None:
        is_fp32 = limits.dtype in (torch.float32, torch.float64)
        expect(is_fp32, NAME, "limits", limits.dtype, torch.float32)
        fits = tuple(limits.shape) in ((2,), (groups, 2))
        expect(fits, NAME, "limits", f"shape {list(limits.shape)}", f"[2] or [{groups}, 2]")
        expect_together(NAME, x, limits=limits)


def _check_groups(op: str, x: torch.Tensor, groups: int) -> None:
    expect_float(op, "x", x)
    expect(x.is_contiguous(), op, "x", "not contiguous", "contiguous")
    expect(groups >= 1, op, "groups", groups, "1 or more")
    told = f"a divisor of the {x.numel()} elements"
    expect(x.numel() % groups == 0, op, "groups", groups, told)


def fake(
    x: torch.Tensor,
    limits: torch.Tensor | None,
    bits: int,
    groups: int,
    symmetric: bool,
    seed: int | None,
) -> torch.Tensor:
    _check(x, limits, bits, groups)
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, limits, _, ctx.groups, ctx.symmetric, _ = inputs
    if limits is not None:
        ctx.save_for_backward(x, limits)


def _backward(call: Any, ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    if ctx.saved_tensors:
        x, limits = ctx.saved_tensors
        rows = x.view(ctx.groups, x.numel() // ctx.groups)
        low, high = range_of(rows.to(limits.dtype), limits)
        if ctx.symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        inside = (rows >= low) & (rows <= high)
        grad = torch.where(inside.view(x.shape), grad, 0.0)
    return grad, None, None, None, None, None


# --- Signs ----------------------------------------------------------------------------------------


def signs_reference(x: torch.Tensor, groups: int, ternary: bool) -> torch.Tensor:
    """As `fake_quantize`, ternary or binary."""
    _check_groups(SIGNS, x, groups)
    rows = wide(x).reshape(groups, x.numel() // groups)
    magnitude = rows.abs()
    scale = magnitude.mean(1, keepdim=True)
    kept = torch.ones_like(rows, dtype=torch.bool)
    if ternary:
        kept = magnitude > TERNARY_THRESHOLD * scale
        count = kept.sum(1, keepdim=True)
        total = torch.where(kept, magnitude, 0.0).sum(1, keepdim=True)
        # Of zeros there is none; a mean that is not finite makes its group NaN.
        scale = torch.where(scale.isfinite(), total / count.clamp(min=1), torch.nan)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    values = torch.where(rows >= 0, scale, -scale)
    # NaN whatever is kept of a group that is NaN.
    values = torch.where(kept, values, 0.0 * scale)
    return _straight(values, rows).to(x.dtype).view(x.shape)


def signs_fake(x: torch.Tensor, groups: int, ternary: bool) -> torch.Tensor:
    _check_groups(SIGNS, x, groups)
    return torch.empty_like(x)


def _signs_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Nothing is kept: the gradient passes."""


def _signs_backward(call: Any, ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return grad, None, None


# --- Cases, floors, benchmarks --------------------------------------------------------------------

#: (shape, limits per group or for all, bits, groups, symmetric, seed)
_CASES: tuple[tuple[Any, ...], ...] = (
    ((4, 256), None, 8, 4, True, None),
    ((3, 5, 7), None, 3, 1, False, None),
    ((1,), None, 2, 1, True, None),
    ((0, 64), None, 4, 8, False, None),
    ((2, 5000), None, 5, 2, False, 3),
    ((2, 5000), None, 6, 1, True, None),
    ((6, 66), None, 4, 18, True, -5),
    ((4, 64), "all", 8, 4, True, None),
    ((4, 96), "each", 3, 4, False, None),
    ((3, 3000), "each", 16, 1, False, 9),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Many groups and one, odd, single, empty and long; limits; unaligned numbers; an overflow."""
    found: list[tuple[Any, ...]] = []
    for shape, kind, *rest in _CASES:
        limits = None
        if kind:
            shown = (rest[1], 2) if kind == "each" else (2,)
            spread = randn(device, torch.float32, *shown, seed=7).abs() / 2 + 0.25
            limits = spread * torch.tensor([-1.0, 1.0], device=device)
        found.append((randn(device, dtype, *shape), limits, *rest))
    odd = randn(device, dtype, 6, 128)
    odd[1], odd[2] = 0.0, odd[2] * torch.finfo(dtype).smallest_normal
    odd[3], odd[3, ::2] = torch.finfo(dtype).max, torch.finfo(dtype).min
    odd[4, 5], odd[5, 127] = torch.nan, -torch.inf
    bad = torch.tensor([[-1.0, 1.0]], device=device).repeat(6, 1)
    bad[0, 1], bad[1, 0], bad[2, 1] = torch.inf, 2.0, torch.nan
    found += [(odd, None, 8, 6, True, None), (odd, None, 4, 1, True, None)]
    found += [(odd, bad, 8, 6, symmetric, None) for symmetric in (True, False)]
    # A distance beyond fp32 is not finite; a range of one number is.
    found.append((odd[:4].clone(), None, 8, 4, False, None))
    return [*found, (unaligned(found[0][0]), *found[0][1:])]


def signs_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for ternary in (False, True):
        for shape, groups in (
            ((4, 256), 4),
            ((3, 5, 7), 1),
            ((0, 8), 2),
            ((2, 5000), 2),
            ((1,), 1),
        ):
            found.append((randn(device, dtype, *shape), groups, ternary))
        odd = randn(device, dtype, 4, 128)
        odd[1], odd[2, 3], odd[3, 4] = 0.0, torch.nan, torch.inf
        found += [(odd, 4, ternary), (unaligned(odd[:2].clone()), 2, ternary)]
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(4, 64, device=device)
    return [
        ("x: got torch.int64", (x.long(), None, 8, 1, True, None)),
        ("x: got not contiguous", (x.t(), None, 8, 1, True, None)),
        ("bits: got 1, expected 2 to 16", (x, None, 1, 1, True, None)),
        ("bits: got 17", (x, None, 17, 1, True, None)),
        ("groups: got 0", (x, None, 8, 0, True, None)),
        ("groups: got 3, expected a divisor of the 256", (x, None, 8, 3, True, None)),
        ("limits: got torch.bfloat16", (x, x[0, :2].bfloat16(), 8, 4, True, None)),
        ("limits: got shape .4, 64., expected .2. or .4, 2.", (x, x, 8, 4, True, None)),
    ]


def signs_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(4, 64, device=device)
    return [
        ("x: got torch.int64", (x.long(), 1, True)),
        ("x: got not contiguous", (x.t(), 1, True)),
        ("groups: got 0", (x, 0, False)),
        ("groups: got 3, expected a divisor of the 256", (x, 3, False)),
    ]


def floor(x: torch.Tensor, *_: Any) -> Floor:
    """One pass, as if x could be kept until the scale is known."""
    return Floor(x.nbytes, x.nbytes, 6 * x.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = randn(device, torch.bfloat16, 4096, 4096)
    return [
        ("4096x4096 bf16 8 bits per row", (x, None, 8, 4096, True, None)),
        ("4096x4096 bf16 6 bits, one group", (x, None, 6, 1, True, None)),
        ("4096x4096 bf16 8 bits stochastic", (x, None, 8, 4096, False, 1)),
    ]


def signs_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = randn(device, torch.bfloat16, 4096, 4096)
    return [("4096x4096 bf16 ternary per row", (x, 4096, True))]


OPS = (
    Op(
        name=NAME,
        schema=(
            "(Tensor x, Tensor? limits, int bits, int groups, bool symmetric, int? seed) -> Tensor"
        ),
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        # In float64 a number next to a tie may become another one.
        tolerance=EXACT,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
        autograd=Autograd(_setup, _backward),
    ),
    Op(
        name=SIGNS,
        schema="(Tensor x, int groups, bool ternary) -> Tensor",
        reference=signs_reference,
        fake=signs_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=signs_cases,
        refused=signs_refused,
        floor=floor,
        benchmarks=signs_benchmarks,
        autograd=Autograd(_signs_setup, _signs_backward),
    ),
)
