"""fake_quantize by other ops: int8 and int4 by codes and back, other widths in place."""

from __future__ import annotations

import torch

from ds_core.ops import run
from ds_core.ops.arguments import wide
from ds_core.ops.block_format import FORMATS
from ds_core.ops.fake_quantize import fake, largest, range_of, scale_of

_FORMATS = {8: FORMATS["int8"], 4: FORMATS["int4"]}


def fake_quantize(
    x: torch.Tensor,
    limits: torch.Tensor | None,
    bits: int,
    groups: int,
    symmetric: bool,
    seed: int | None,
) -> torch.Tensor:
    """As `ds_core.ops.fake_quantize.reference`."""
    y = fake(x, limits, bits, groups, symmetric, seed)
    if x.numel() == 0:
        return y
    rows = x.view(groups, x.numel() // groups)
    if _has_codes(rows.shape[1], bits, limits):
        number, block = _FORMATS[bits].number, rows.shape[1]
        codes, scales, zeros = run("quantize_blocks", rows, number, block, symmetric, seed, 1, 1)
        given = None if symmetric else zeros
        there = (codes, scales, given, number, block, x.dtype, True)
        found: torch.Tensor = run("dequantize_blocks", *there)
        return found.view(x.shape)
    numbers = wide(rows)
    low, high = range_of(numbers, limits)
    scale, zero = scale_of(low, high, bits, symmetric)
    numbers = numbers - zero if not symmetric else numbers
    numbers = torch.mul(numbers, 1.0 / scale).round_()
    most = largest(bits, symmetric)
    numbers.clamp_(-most if symmetric else 0, most).mul_(scale)
    return y.view(rows.shape).copy_(numbers if symmetric else numbers.add_(zero)).view(x.shape)


def why_not(
    x: torch.Tensor,
    limits: torch.Tensor | None,
    bits: int,
    groups: int,
    symmetric: bool,
    seed: int | None,
) -> str | None:
    """Why a call is not taken, or None."""
    plain = seed is None or groups < 1 or _has_codes(x.numel() // groups, bits, limits)
    return None if plain else "random rounding to other than 8 or 4 bits, or within limits"


def _has_codes(size: int, bits: int, limits: torch.Tensor | None) -> bool:
    """Whether there are codes for groups of that size."""
    return bits in _FORMATS and limits is None and size * bits % 8 == 0
