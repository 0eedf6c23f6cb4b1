"""What programs of optimizer steps do with their elements.

`optimizer_steps.py` says what for, and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_ops.triton_kernels.stepping import (
    bits_of,
    elements,
    gradient,
    put,
    put_param,
    take,
)


@triton.jit(do_not_specialize=["k0", "k1"])
def adam_elements(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    copy,
    kept_param,
    kept_avg,
    kept_sq,
    grad_scale,
    found_inf,
    numel,
    k0,
    k1,
    sign,
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
    KEPT: tl.constexpr,
    SCALED: tl.constexpr,
    FLAGGED: tl.constexpr,
    SEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`m = b1 m + r1 g`, `v = b2 v + r2 g g`, `p = decay p - size m / (sqrt(v) root + eps)`."""
    at, there, live = elements(numel, found_inf, FLAGGED, BLOCK)
    p = take(param, kept_param, at, there, live, KEPT)
    m = take(exp_avg, kept_avg, at, there, live, KEPT)
    v = take(exp_avg_sq, kept_sq, at, there, live, KEPT)
    g = gradient(grad, grad_scale, sign, at, live, SCALED)
    if COUPLED:
        g = g + l2 * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p = p * decay - step_size * (m / (tl.sqrt_rn(v) * root_scale + eps))
    bits = bits_of(at, k0, k1, SEEDED)
    put(exp_avg, at, live, m, bits >> 16, SEEDED)
    put(exp_avg_sq, at, live, v, (bits * 0x9E3779B1) >> 16, SEEDED)
    put_param(param, copy, at, live, p, bits, COPY, SEEDED)


@triton.jit(do_not_specialize=["k0", "k1"])
def lion_elements(
    param,
    grad,
    exp_avg,
    copy,
    kept_param,
    kept_avg,
    grad_scale,
    found_inf,
    numel,
    k0,
    k1,
    sign,
    beta1,
    rest1,
    beta2,
    rest2,
    lr,
    decay,
    COPY: tl.constexpr,
    KEPT: tl.constexpr,
    SCALED: tl.constexpr,
    FLAGGED: tl.constexpr,
    SEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`p = decay p - lr sign(b1 m + r1 g)`, `m = b2 m + r2 g`."""
    at, there, live = elements(numel, found_inf, FLAGGED, BLOCK)
    p = take(param, kept_param, at, there, live, KEPT)
    m = take(exp_avg, kept_avg, at, there, live, KEPT)
    g = gradient(grad, grad_scale, sign, at, live, SCALED)
    mix = beta1 * m + rest1 * g
    # 0 and NaN are their own signs.
    mix = tl.where(mix > 0.0, 1.0, tl.where(mix < 0.0, -1.0, mix))
    bits = bits_of(at, k0, k1, SEEDED)
    put(exp_avg, at, live, beta2 * m + rest2 * g, bits >> 16, SEEDED)
    put_param(param, copy, at, live, p * decay - lr * mix, bits, COPY, SEEDED)


@triton.jit(do_not_specialize=["k0", "k1"])
def adagrad_elements(
    param,
    grad,
    total,
    copy,
    kept_param,
    kept_total,
    grad_scale,
    found_inf,
    numel,
    k0,
    k1,
    sign,
    lr,
    eps,
    l2,
    COUPLED: tl.constexpr,
    COPY: tl.constexpr,
    KEPT: tl.constexpr,
    SCALED: tl.constexpr,
    FLAGGED: tl.constexpr,
    SEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`s = s + g g`, `p = p - lr g / (sqrt(s) + eps)`."""
    at, there, live = elements(numel, found_inf, FLAGGED, BLOCK)
    p = take(param, kept_param, at, there, live, KEPT)
    s = take(total, kept_total, at, there, live, KEPT)
    g = gradient(grad, grad_scale, sign, at, live, SCALED)
    if COUPLED:
        g = g + l2 * p
    s = s + g * g
    bits = bits_of(at, k0, k1, SEEDED)
    put(total, at, live, s, bits >> 16, SEEDED)
    p = p - lr * (g / (tl.sqrt_rn(s) + eps))
    put_param(param, copy, at, live, p, bits, COPY, SEEDED)


@triton.jit(do_not_specialize=["k0", "k1"])
def sgd_elements(
    param,
    grad,
    buffer,
    copy,
    kept_param,
    kept_buffer,
    grad_scale,
    found_inf,
    numel,
    k0,
    k1,
    sign,
    lr,
    l2,
    momentum,
    rest,
    first,
    COUPLED: tl.constexpr,
    BUFFERED: tl.constexpr,
    NESTEROV: tl.constexpr,
    COPY: tl.constexpr,
    KEPT: tl.constexpr,
    SCALED: tl.constexpr,
    FLAGGED: tl.constexpr,
    SEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`b = momentum b + rest g`, or g if `first` is not 0; `p = p - lr (b or g + momentum b)`."""
    at, there, live = elements(numel, found_inf, FLAGGED, BLOCK)
    p = take(param, kept_param, at, there, live, KEPT)
    g = gradient(grad, grad_scale, sign, at, live, SCALED)
    bits = bits_of(at, k0, k1, SEEDED)
    if COUPLED:
        g = g + l2 * p
    if BUFFERED:
        b = take(buffer, kept_buffer, at, there, live, KEPT)
        b = tl.where(first != 0.0, g, momentum * b + rest * g)
        put(buffer, at, live, b, bits >> 16, SEEDED)
        if NESTEROV:
            g = g + momentum * b
        else:
            g = b
    put_param(param, copy, at, live, p - lr * g, bits, COPY, SEEDED)


@triton.jit
def _restored(stream, kept, at, mask):
    """Put back what `stepping.keep` stored; returns it, in fp32."""
    kind = stream.dtype.element_ty
    if kept.dtype.element_ty == kind:
        raw = tl.load(kept + at, mask=mask)
    else:
        size: tl.constexpr = kind.primitive_bitwidth // 8
        bits = at.to(tl.uint32) * 0
        for place in tl.static_range(size):
            byte = tl.load(kept + at * size + place, mask=mask, other=0)
            bits |= byte.to(tl.uint32) << (8 * place)
        if size == 4:
            raw = bits.to(kind, bitcast=True)
        else:
            raw = bits.to(tl.uint16).to(kind, bitcast=True)
    tl.store(stream + at, raw, mask=mask)
    return raw.to(tl.float32)


@triton.jit
def undo_elements(
    param,
    first,
    second,
    copy,
    kept_param,
    kept_first,
    kept_second,
    numel,
    STATES: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bytes of the parameter and its states as a step found them."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    p = _restored(param, kept_param, at, mask)
    if STATES > 0:
        _restored(first, kept_first, at, mask)
    if STATES > 1:
        _restored(second, kept_second, at, mask)
    if COPY:
        tl.store(copy + at, p.to(copy.dtype.element_ty), mask=mask)
