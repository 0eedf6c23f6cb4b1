"""Fake quantization: what x becomes on its way to codes and back, without the codes.

A program holds whole groups, and moves each byte once. A group that is longer is read a second
time: its range is then found by torch's `aminmax`, its mean magnitude by parts, added in a fixed
order. Uniform steps are equal to the reference's, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import fake_quantize as op
from ds_ops.triton_kernels.block_codes import key_of, magnitude_of, product, rounded, scaling
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch


@triton.jit
def _tile(groups, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: (groups, which of them exist, places in them)."""
    parts = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // parts) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    return row, row < groups, column


@triton.jit(do_not_specialize=["groups", "seed", "step"])
def fake_quantize_tile(
    x,
    limits,
    y,
    groups,
    size,
    step,
    inverse_most,
    most,
    seed,
    nothing,
    LIMITED: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """BLOCK numbers of each of ROWS groups, whose limits are `step` numbers apart, if LIMITED.

    Else WHOLE groups, whose range is found here.
    """
    row, there, column = _tile(groups, size, ROWS, BLOCK)
    mask = there[:, None] & (column < size)[None, :]
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if LIMITED:
        at_limits = limits + row.to(tl.int64) * step
        low = tl.load(at_limits, mask=there, other=0.0)
        high = tl.load(at_limits + 1, mask=there, other=0.0)
        largest = tl.maximum(magnitude_of(low), magnitude_of(high))
        largest = tl.where(high >= low, largest, 0x7F800000)  # no range
    else:
        largest = tl.max(magnitude_of(value), axis=1)
        low = tl.min(tl.where(mask, value, float("inf")), axis=1)
        high = tl.max(tl.where(mask, value, float("-inf")), axis=1)
    scale, zero, _ = scaling(largest, low, high, inverse_most, ASYMMETRIC)
    inverse = tl.div_rn(1.0, scale)
    scaled = product(value - zero[:, None], inverse[:, None], nothing)
    # Cut off before it is rounded, which is the same as after; NaN is put back below.
    scaled = tl.minimum(tl.maximum(scaled, 0.0 if ASYMMETRIC else -most), most)
    key = row
    if STOCHASTIC:
        key = key_of(seed, row)
    number = rounded(scaled, key, column, STOCHASTIC).to(tl.float32)
    found = product(number, scale[:, None], nothing) + zero[:, None]
    found = tl.where(value == value, found, value)
    tl.store(y + at, found.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups"])
def magnitude_tile(
    x,
    thresholds,
    sums,
    counts,
    groups,
    size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Of a part of a group: the sum of the |x| that exceed its threshold, and how many do."""
    row, there, column = _tile(groups, size, ROWS, BLOCK)
    mask = there[:, None] & (column < size)[None, :]
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    magnitude = tl.abs(tl.load(x + at, mask=mask, other=0.0).to(tl.float32))
    threshold = tl.load(thresholds + row, mask=there, other=0.0)[:, None]
    # Written so that a NaN counts.
    kept = mask & ~(magnitude <= threshold)
    parts = tl.cdiv(size, BLOCK)
    to = row.to(tl.int64) * parts + tl.program_id(0) % parts
    tl.store(sums + to, tl.sum(tl.where(kept, magnitude, 0.0), axis=1), mask=there)
    tl.store(counts + to, tl.sum(tl.where(kept, 1, 0), axis=1), mask=there)


@triton.jit(do_not_specialize=["groups"])
def signs_tile(
    x,
    thresholds,
    scales,
    y,
    groups,
    size,
    portion,
    KNOWN: tl.constexpr,
    TERNARY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """BLOCK numbers of each of ROWS groups as `+-scale`, or 0 where |x| is at most the threshold.

    KNOWN: thresholds and scales are given; else found here, of WHOLE groups: a threshold is
    `portion` times the mean.
    """
    row, there, column = _tile(groups, size, ROWS, BLOCK)
    mask = there[:, None] & (column < size)[None, :]
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    magnitude = tl.abs(value)
    if KNOWN:
        threshold = tl.load(thresholds + row, mask=there, other=0.0)
        scale = tl.load(scales + row, mask=there, other=0.0)
    else:
        mean = tl.sum(magnitude, axis=1) / size
        threshold = mean * portion
        scale = mean
        if TERNARY:
            kept = mask & (magnitude > threshold[:, None])
            count = tl.maximum(tl.sum(tl.where(kept, 1, 0), axis=1), 1)
            scale = tl.sum(tl.where(kept, magnitude, 0.0), axis=1) / count
        scale = tl.where((mean < float("inf")) & (scale < float("inf")), scale, float("nan"))
    found = tl.where(value >= 0, scale[:, None], -scale[:, None])
    if TERNARY:
        found = tl.where(magnitude > threshold[:, None], found, 0.0 * scale[:, None])
    tl.store(y + at, found.to(y.dtype.element_ty), mask=mask)


#: Groups are numbered with 32 bits, also those of the last program that are none, and so are places
#: in them.
_MOST = 2**31 - 16
_CONFIGS = (
    *(
        Config({"ROWS": rows, "BLOCK": size, "WHOLE": 1}, {"size": size, "groups": _MOST}, warps)
        for rows, size, warps in ((8, 256, 4), (1, 4096, 8))
    ),
    Config({"ROWS": 1, "BLOCK": 4096, "WHOLE": 0}, {"size": _MOST - 4096, "groups": _MOST}, 8),
)
_SIZES = {"i32": "groups", "i32:16": "size"}
_UNIFORM, _LIMITED = (
    Kernel(
        fake_quantize_tile,
        configs,
        types(
            {
                "*bf16": "x y",
                "*fp32": "limits",
                "i32": "groups step",
                "i32:16": "size",
                "fp32": "inverse_most most nothing",
                "i64": "seed",
            },
            LIMITED=limited,
            ASYMMETRIC=True,
            STOCHASTIC=True,
        ),
        variant="limited" if limited else "",
    )
    for limited, configs in ((False, _CONFIGS[:2]), (True, _CONFIGS))
)
_MAGNITUDES = Kernel(
    magnitude_tile,
    _CONFIGS[2:],
    types({"*bf16": "x", "*fp32": "thresholds sums", "*i32": "counts", **_SIZES}),
)
_SIGNS, _KNOWN = (
    Kernel(
        signs_tile,
        configs,
        types(
            {"*bf16": "x y", "*fp32": "thresholds scales", "fp32": "portion", **_SIZES},
            KNOWN=known,
            TERNARY=True,
        ),
        variant="known" if known else "",
    )
    for known, configs in ((False, _CONFIGS[:2]), (True, _CONFIGS[2:]))
)
KERNELS = (_UNIFORM, _LIMITED, _MAGNITUDES, _SIGNS, _KNOWN)


def _grid(config: Config, groups: int, size: int) -> tuple[int]:
    return (blocks(groups, config.constants["ROWS"]) * blocks(size, config.constants["BLOCK"]),)


def fake_quantize(
    x: torch.Tensor,
    limits: torch.Tensor | None,
    bits: int,
    groups: int,
    symmetric: bool,
    seed: int | None,
) -> torch.Tensor:
    """As `ds_core.ops.fake_quantize.reference`."""
    y = op.fake(x, limits, bits, groups, symmetric, seed)
    expect_plain(op.NAME, x=x, limits=limits)
    size = x.numel() // groups
    config = _LIMITED.config(op.NAME, x.device, size=size, groups=groups)
    if limits is None and not config.constants["WHOLE"]:
        limits = torch.stack(x.view(groups, size).aminmax(dim=1), dim=1).float()
    step = 0 if limits is None or limits.dim() == 1 else 2
    most = op.largest(bits, symmetric)
    launch(
        *(_LIMITED, config, _grid(config, groups, size)),
        *(x, x if limits is None else limits, y, groups, size, step),
        *(1.0 / most, float(most), seed or 0, -0.0),
        LIMITED=limits is not None,
        ASYMMETRIC=not symmetric,
        STOCHASTIC=seed is not None,
    )
    return y


def fake_quantize_signs(x: torch.Tensor, groups: int, ternary: bool) -> torch.Tensor:
    """As `ds_core.ops.fake_quantize.signs_reference`."""
    y = op.signs_fake(x, groups, ternary)
    expect_plain(op.SIGNS, x=x)
    size = x.numel() // groups
    kernel = _SIGNS if size <= _CONFIGS[1].up_to["size"] else _KNOWN
    config = kernel.config(op.SIGNS, x.device, size=size, groups=groups)
    known = (x, x) if config.constants["WHOLE"] else _levels(x, groups, size, config, ternary)
    launch(
        *(kernel, config, _grid(config, groups, size)),
        *(x, *known, y, groups, size, op.TERNARY_THRESHOLD),
        KNOWN=not config.constants["WHOLE"],
        TERNARY=ternary,
    )
    return y


def _levels(
    x: torch.Tensor, groups: int, size: int, config: Config, ternary: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(threshold, scale) of groups that are longer than what a program holds."""
    thresholds = x.new_full((groups,), -1.0, dtype=torch.float32)  # which every |x| exceeds
    total, _ = _magnitudes(x, thresholds, groups, size, config)
    mean = scale = total / size
    if ternary:
        thresholds = mean.float() * op.TERNARY_THRESHOLD
        total, count = _magnitudes(x, thresholds, groups, size, config)
        scale = total / count.clamp(min=1)
    return thresholds, (scale + mean * 0.0).float()  # what is not finite becomes NaN


def _magnitudes(
    x: torch.Tensor, thresholds: torch.Tensor, groups: int, size: int, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, number) of the |x| above each group's threshold."""
    parts = blocks(size, config.constants["BLOCK"])
    sums = x.new_empty(groups, parts, dtype=torch.float32)
    counts = x.new_empty(groups, parts, dtype=torch.int32)
    given = (x, thresholds, sums, counts, groups, size)
    launch(_MAGNITUDES, config, _grid(config, groups, size), *given)
    return sums.sum(1, dtype=torch.float64), counts.sum(1)
