"""LAMB in two passes: a direction with its norms, then a step along it.

No atomics: every program leaves its sums, which are added in a fixed order, so that a step is the
same in every run. The host never sees the norms: the second pass takes its ratio on the device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ds_core.ops import lamb_update as of
from ds_ops.triton_kernels.kernel import Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.stepping import CONFIGS, cut, elements, gradient, parts


@triton.jit(do_not_specialize=["stride"])
def lamb_update_elements(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    update,
    sums,
    grad_scale,
    found_inf,
    numel,
    stride,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    mean_scale,
    root_scale,
    l2,
    SCALED: tl.constexpr,
    FLAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`u = scale m / (sqrt(v) root + eps) + l2 p` and this program's sums of p p and of u u.

    sums: `[2, stride]`, fp32.
    """
    at, _, live = elements(numel, found_inf, FLAGGED, BLOCK)
    p = tl.load(param + at, mask=live, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=live, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=live, other=0.0).to(tl.float32)
    g = gradient(grad, grad_scale, 1.0, at, live, SCALED)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=live)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=live)
    ratio = m * mean_scale / (tl.sqrt_rn(v) * root_scale + eps)
    # Without this 0 / 0 where eps is 0 and a gradient was never other than 0.
    u = tl.where(m == 0.0, 0.0, ratio) + l2 * p
    tl.store(update + at, u, mask=live)
    tl.store(sums + tl.program_id(0), tl.sum(p * p))
    tl.store(sums + stride + tl.program_id(0), tl.sum(u * u))


@triton.jit
def lamb_apply_elements(
    param,
    update,
    copy,
    ratio,
    found_inf,
    numel,
    step_size,
    COPY: tl.constexpr,
    RATIO: tl.constexpr,
    FLAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`p = p - step_size ratio u`."""
    at, _, live = elements(numel, found_inf, FLAGGED, BLOCK)
    p = tl.load(param + at, mask=live, other=0.0).to(tl.float32)
    factor = step_size
    if RATIO:
        factor = factor * tl.load(ratio).to(tl.float32)
    p = (p - factor * tl.load(update + at, mask=live, other=0.0)).to(param.dtype.element_ty)
    tl.store(param + at, p, mask=live)
    if COPY:
        tl.store(copy + at, p.to(tl.float32).to(copy.dtype.element_ty), mask=live)


_UPDATE = Kernel(
    lamb_update_elements,
    CONFIGS,
    types(
        {
            "*bf16": "grad",
            "*fp32": "param exp_avg exp_avg_sq update sums grad_scale found_inf",
            "i32:16": "numel",
            "i32": "stride",
            "fp32": "beta1 rest1 beta2 rest2 eps mean_scale root_scale l2",
        },
        SCALED=True,
        FLAGGED=True,
    ),
)
_APPLY = Kernel(
    lamb_apply_elements,
    CONFIGS,
    types(
        {
            "*bf16": "copy",
            "*fp32": "param update ratio found_inf",
            "i32:16": "numel",
            "fp32": "step_size",
        },
        COPY=True,
        RATIO=True,
        FLAGGED=True,
    ),
)
KERNELS = (_UPDATE, _APPLY)


def lamb_update_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    update: torch.Tensor,
    grad_scale: torch.Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    bias_correction: bool,
    found_inf: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `ds_core.ops.lamb_update.reference`."""
    tensors = (param, grad, exp_avg, exp_avg_sq, update, grad_scale)
    rates = (beta1, beta2, eps, weight_decay, step, bias_correction)
    of.fake(*tensors, *rates, found_inf)
    expect_plain(of.NAME, param=param, grad=grad)
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    numel, config = param.numel(), _UPDATE.config(of.NAME, param.device)
    block = config.constants["BLOCK"]
    sums = param.new_empty((2, blocks(numel, block)), dtype=torch.float32)
    every = tensors[:5]
    for begin, end in parts(numel):
        own = every if end - begin == numel else [cut(t, numel, begin, end) for t in every]
        launch(
            *(_UPDATE, config, (blocks(end - begin, block),)),
            *(*own, sums.view(-1).narrow(0, begin // block, sums.numel() - begin // block)),
            *(param if t is None else t for t in (grad_scale, found_inf)),
            *(end - begin, sums.shape[1], beta1, 1 - beta1, beta2, 1 - beta2, eps),
            *(1 / first, 1 / math.sqrt(second), weight_decay),
            SCALED=grad_scale is not None,
            FLAGGED=found_inf is not None,
        )
    # In float64: a long sum in fp32 would lose what is small beside it.
    return sums.sum(1, dtype=torch.float64).float()


def lamb_apply_(
    param: torch.Tensor,
    update: torch.Tensor,
    copy: torch.Tensor | None,
    step_size: float,
    ratio: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """As `ds_core.ops.lamb_update.apply_reference`."""
    of.apply_fake(param, update, copy, step_size, ratio, found_inf)
    expect_plain(of.APPLY, param=param, copy=copy)
    numel, config = param.numel(), _APPLY.config(of.APPLY, param.device)
    every = [param, update, param if copy is None else copy]
    for begin, end in parts(numel):
        own = every if end - begin == numel else [cut(t, numel, begin, end) for t in every]
        launch(
            *(_APPLY, config, (blocks(end - begin, config.constants["BLOCK"]),)),
            *(*own, *(param if t is None else t for t in (ratio, found_inf))),
            *(end - begin, step_size),
            COPY=copy is not None,
            RATIO=ratio is not None,
            FLAGGED=found_inf is not None,
        )
