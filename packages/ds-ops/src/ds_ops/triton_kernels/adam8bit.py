"""A step of Adam whose states take eight bits each: decoded, advanced and encoded in one pass.

A program holds whole blocks of 256 elements, one a row: the largest of a row is its new scale. With
everything else in bf16, an element moves 10 bytes: a third of what it moves with fp32 states, while
decoding and encoding take some 60 integer operations, which still hide behind the memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ds_core.ops import adam8bit_step as of
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.stepping import (
    NVIDIA,
    changed,
    gradient,
    keys,
    parts,
    put_param,
    random_bits,
)

#: Elements that share a scale.
_BLOCK = of.BLOCK

_SMALLEST = tl.constexpr(2.0**-126)
#: Bits 20 and up of the float that code 0 would stand for: of a state with a sign, and without.
_MEAN, _SQUARE = tl.constexpr(889), tl.constexpr(761)
_NEAREST = tl.constexpr(1 << 19)


@triton.jit
def _scale_of(bits):
    """The scale of each row, of which these are the bits of |elements|: NaN and infinity stay."""
    scale = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    return tl.where((scale > 0.0) & (scale < _SMALLEST), _SMALLEST, scale)


@triton.jit
def _codes(bits, scale, noise, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """The high bits of |element| / scale, rounded by what is added below them."""
    divisor = tl.where(scale > 0.0, scale, 1.0)[:, None]
    ratio = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.broadcast_to(divisor, bits.shape))
    code = ((ratio.to(tl.int32, bitcast=True) + noise) >> 20) - LOWEST
    return tl.minimum(tl.maximum(code, 0), HIGHEST)


@triton.jit(do_not_specialize=["k0", "k1"])
def adam8bit_elements(
    param,
    grad,
    mean_codes,
    mean_scales,
    square_codes,
    square_scales,
    copy,
    grad_scale,
    found_inf,
    numel,
    k0,
    k1,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    step_size,
    root_scale,
    decay,
    l2,
    COUPLED: tl.constexpr,
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    FLAGGED: tl.constexpr,
    SEEDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS blocks of BLOCK elements, each with its scales."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    end = changed(numel, found_inf, FLAGGED)
    live = at < end
    whole = row * BLOCK < end
    p = tl.load(param + at, mask=live, other=0.0).to(tl.float32)
    g = gradient(grad, grad_scale, 1.0, at, live, SCALED)
    if COUPLED:
        g = g + l2 * p

    code = tl.load(mean_codes + at, mask=live, other=0).to(tl.int32)
    size = code & 127
    m = ((size + _MEAN) << 20).to(tl.float32, bitcast=True)
    m = tl.where(size == 0, 0.0, tl.where(code >= 128, -m, m))
    m = m * tl.load(mean_scales + row, mask=whole, other=0.0)[:, None]
    m = beta1 * m + rest1 * g
    code = tl.load(square_codes + at, mask=live, other=0).to(tl.int32)
    v = ((code + _SQUARE) << 20).to(tl.float32, bitcast=True)
    v = v * tl.load(square_scales + row, mask=whole, other=0.0)[:, None]
    v = beta2 * v + rest2 * g * g
    p = p * decay - step_size * (m / (tl.sqrt_rn(v) * root_scale + eps))

    bits = at.to(tl.uint32) * 0
    mean_noise = at * 0 + _NEAREST
    square_noise = mean_noise
    if SEEDED:
        # Two neighbours share random bits, the second one with their ends exchanged.
        bits = random_bits(at >> 1, k0, k1)
        odd = (at & 1) == 1
        low = (bits & 0xFFFFF).to(tl.int32)
        high = (bits >> 12).to(tl.int32)
        mean_noise = tl.where(odd, high, low)
        square_noise = tl.where(odd, low, high)
        bits = tl.where(odd, bits >> 16, bits)
    put_param(param, copy, at, live, p, bits, COPY, SEEDED)

    # Of what is beyond the end: nothing that could be the largest.
    sizes = tl.where(live, m.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    scale = _scale_of(sizes)
    codes = _codes(sizes, scale, mean_noise, _MEAN, 127)
    codes += tl.where(m.to(tl.int32, bitcast=True) < 0, 128, 0)
    tl.store(mean_codes + at, codes.to(tl.uint8), mask=live)
    tl.store(mean_scales + row, scale, mask=whole)
    sizes = tl.where(live, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    scale = _scale_of(sizes)
    codes = _codes(sizes, scale, square_noise, _SQUARE, 255)
    tl.store(square_codes + at, codes.to(tl.uint8), mask=live)
    tl.store(square_scales + row, scale, mask=whole)


_CONFIGS = (
    Config({"ROWS": 4, "BLOCK": _BLOCK}, warps=8, targets=NVIDIA),
    Config({"ROWS": 4, "BLOCK": _BLOCK}, warps=4, targets=("gfx942",)),
)
_KERNEL = Kernel(
    adam8bit_elements,
    _CONFIGS,
    types(
        {
            "*bf16": "param grad copy",
            "*u8": "mean_codes square_codes",
            "*fp32": "mean_scales square_scales grad_scale found_inf",
            "i32:16": "numel",
            "i32": "k0 k1",
            "fp32": "beta1 rest1 beta2 rest2 eps step_size root_scale decay l2",
        },
        COUPLED=False,
        COPY=False,
        SCALED=True,
        FLAGGED=True,
        SEEDED=True,
    ),
)
KERNELS = (_KERNEL,)


def adam8bit_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg_codes: torch.Tensor,
    exp_avg_scales: torch.Tensor,
    exp_avg_sq_codes: torch.Tensor,
    exp_avg_sq_scales: torch.Tensor,
    copy: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
    seed: int | None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """As `ds_core.ops.adam8bit_step.reference`."""
    states = (exp_avg_codes, exp_avg_scales, exp_avg_sq_codes, exp_avg_sq_scales)
    rates: tuple[Any, ...] = (lr, beta1, beta2, eps, weight_decay, step)
    rest: tuple[Any, ...] = (decoupled, seed, found_inf)
    of.fake(param, grad, *states, copy, grad_scale, *rates, *rest)
    expect_plain(of.NAME, param=param, grad=grad, copy=copy)
    numel, config = param.numel(), _KERNEL.config(of.NAME, param.device)
    every = [param, grad, *states, param if copy is None else copy]
    for begin, end in parts(numel):
        own = every if end - begin == numel else [_cut(t, numel, begin, end) for t in every]
        launch(
            *(_KERNEL, config, (blocks(end - begin, _BLOCK * config.constants["ROWS"]),)),
            *(*own, *(param if t is None else t for t in (grad_scale, found_inf))),
            *(end - begin, *keys(seed, begin // 2)),
            *(beta1, 1 - beta1, beta2, 1 - beta2, eps, lr / (1 - beta1**step)),
            1 / math.sqrt(1 - beta2**step),
            *(1 - lr * weight_decay if decoupled else 1.0, weight_decay),
            COUPLED=not decoupled and weight_decay != 0,
            COPY=copy is not None,
            SCALED=grad_scale is not None,
            FLAGGED=found_inf is not None,
            SEEDED=seed is not None,
        )


def _cut(t: torch.Tensor, numel: int, begin: int, end: int) -> torch.Tensor:
    """What belongs to elements [begin, end): of scales, one for each block."""
    each = 1 if t.numel() == numel else _BLOCK
    return t.view(-1)[begin // each : blocks(end, each)]
