"""Activations and their derivatives, in fp32, for the kernels that contain one."""

from __future__ import annotations

import triton
import triton.language as tl

#: Positions in the ACTIVATIONS of ops; silu is 0.
GELU, GELU_TANH, RELU = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _exponent(v, ACTIVATION: tl.constexpr):
    """Of silu and gelu_tanh, which are v * sigmoid(u): u."""
    if ACTIVATION == GELU_TANH:
        v = v * (1.5957691216057308 + 0.07135481627260025 * v * v)
    return v


@triton.jit
def gate_of(v, ACTIVATION: tl.constexpr):
    """The activation divided by v; not of relu."""
    if ACTIVATION == GELU:
        s = 0.5 + 0.5 * tl.erf(v * 0.7071067811865476)
    else:
        s = 1.0 / (1.0 + tl.exp(-_exponent(v, ACTIVATION)))
    return s


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """The activation."""
    if ACTIVATION == RELU:
        y = tl.where(v <= 0.0, 0.0, v)  # written so that a NaN comes through
    else:
        y = v * gate_of(v, ACTIVATION)
    return y


@triton.jit
def slope_of(v, s, ACTIVATION: tl.constexpr):
    """The activation's derivative, not of relu; s: `gate_of` of v."""
    if ACTIVATION == GELU:
        slope = s + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
    elif ACTIVATION == GELU_TANH:
        inner = 1.5957691216057308 + 0.21406444881780075 * v * v
        slope = s + v * s * (1.0 - s) * inner
    else:
        slope = s + v * s * (1.0 - s)
    return slope


@triton.jit
def derivative(v, ACTIVATION: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == RELU:
        slope = tl.where(v > 0.0, 1.0, 0.0)
    else:
        slope = slope_of(v, gate_of(v, ACTIVATION), ACTIVATION)
    return slope
