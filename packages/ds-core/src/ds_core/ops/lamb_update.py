"""A step of LAMB in two passes: a direction with its norm, then the step along it.

Source: You et al. 2020, Algorithm 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ds_core.ops import optimizer_step as common
from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_together,
    randn,
    wide,
    wide_dtype,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME, APPLY = "lamb_update_", "lamb_apply_"


def lamb_update_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    update: torch.Tensor,
    *,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> torch.Tensor:
    """Update the averages as `adam_step_` does, and write Adam's direction to `update`, in fp32.

    `update`: fp32 in the shape of `param`, gets `m / (sqrt(v) + eps) + wd p`, with m and v bias-
    corrected. Returns `[|param|^2, |update|^2]`, fp32 `[2]`, for the trust ratio. If `found_inf`,
    0-dim fp32, is not 0, nothing is changed and both are 0.
    """
    result: torch.Tensor = run(
        NAME,
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        update,
        grad_scale,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        bias_correction,
        found_inf,
    )
    return result


def lamb_apply_(
    param: torch.Tensor,
    update: torch.Tensor,
    step_size: float,
    copy: torch.Tensor | None = None,
    *,
    ratio: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """`param -= step_size * ratio * update`; `copy` gets the new parameter, rounded to nearest.

    Args:
        param, copy: fp32, bf16 or fp16; update: fp32, in the same shape, as `lamb_update_` left it.
        ratio: 0-dim fp32, on the device, so that no host waits for norms; None: 1.
        found_inf: 0-dim fp32; if it is not 0, nothing is changed.
    """
    run(APPLY, param, update, copy, step_size, ratio, found_inf)


def reference(
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
    """As `lamb_update_`."""
    rates = (beta1, beta2, eps, weight_decay, step, bias_correction)
    squares = fake(param, grad, exp_avg, exp_avg_sq, update, grad_scale, *rates, found_inf)
    g, p = common.effective_gradient(grad, grad_scale), wide(param)
    mean = beta1 * wide(exp_avg) + (1 - beta1) * g
    square = beta2 * wide(exp_avg_sq) + (1 - beta2) * g * g
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    direction = mean / first / (square.sqrt() / math.sqrt(second) + eps) + weight_decay * p
    squares.zero_()
    with common.unless(found_inf, [exp_avg, exp_avg_sq, update, squares]):
        exp_avg.copy_(mean)
        exp_avg_sq.copy_(square)
        update.copy_(direction)
        squares.copy_(torch.stack([t.double().square().sum() for t in (p, direction)]))
    return squares


def _check_update(op: str, param: torch.Tensor, update: torch.Tensor) -> None:
    expected = wide_dtype(param.dtype)
    expect(update.dtype is expected, op, "update", update.dtype, expected)
    expect_shape(op, "update", update, param.shape)
    expect_together(op, param, update=update)
    expect(update.is_contiguous(), op, "update", "a tensor with gaps", "a contiguous one")


def fake(
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
    """The squares, without values; raises OpError for what does not fit."""
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    common.check_step(NAME, param, grad, states, grad_scale=grad_scale, found_inf=found_inf)
    common.check_rates(NAME, beta1=beta1, beta2=beta2, eps=eps, step=step)
    _check_update(NAME, param, update)
    return param.new_empty(2, dtype=wide_dtype(param.dtype))


def apply_reference(
    param: torch.Tensor,
    update: torch.Tensor,
    copy: torch.Tensor | None,
    step_size: float,
    ratio: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """As `lamb_apply_`."""
    apply_fake(param, update, copy, step_size, ratio, found_inf)
    factor = step_size if ratio is None else step_size * ratio
    with common.unless(found_inf, [param, copy]):
        common.finish(param, wide(param) - factor * update, copy, None)


def apply_fake(
    param: torch.Tensor,
    update: torch.Tensor,
    copy: torch.Tensor | None,
    step_size: float,
    ratio: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """It returns nothing; raises OpError for what does not fit."""
    expect_float(APPLY, "param", param)
    expect(param.is_contiguous(), APPLY, "param", "a tensor with gaps", "a contiguous one")
    _check_update(APPLY, param, update)
    common.check_scalars(APPLY, param, ratio=ratio, found_inf=found_inf)
    if copy is not None:
        expect_float(APPLY, "copy", copy)
        expect_shape(APPLY, "copy", copy, param.shape)
        expect_together(APPLY, param, copy=copy)
        expect(copy.is_contiguous(), APPLY, "copy", "a tensor with gaps", "a contiguous one")


#: beta1, beta2, eps, weight_decay, step, bias_correction.
_SETTINGS = ((0.9, 0.999, 1e-8, 0.01, 1, True), (0.8, 0.95, 1e-6, 0.0, 9, False))


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd, single and empty sizes; mixed formats; a gradient scale."""
    scale = torch.tensor(0.25, device=device)
    found: list[tuple[Any, ...]] = []
    tensors = common.tensors_of_cases(device, dtype, (False, True))
    for index, (param, grad, (mean, square), _) in enumerate(tensors):
        update = torch.zeros(param.shape, device=device)
        factor = scale if index % 2 else None
        found.append((param, grad, mean, square, update, factor, *_SETTINGS[index % 2]))
    no, yes = torch.zeros((), device=device), torch.full((), 2.0, device=device)
    return [*found, (*found[2], yes), (*found[4], no)]


def apply_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for param, _, (update,), copy in common.tensors_of_cases(device, dtype, (False,)):
        found.append((param, update.float(), copy, 0.125))
    ratio, flag = torch.tensor(0.3, device=device), torch.tensor(2.0, device=device)
    return [
        *found,
        (*found[2], ratio),
        (*found[2], None, flag),
        (*found[4], ratio, torch.zeros_like(flag)),
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    a, b, c, d, e = (torch.ones(8, device=device) for _ in range(5))
    return [
        ("grad: (got shape|has)", (a, b[:7], c, d, e, None, *_SETTINGS[0])),
        ("update: got torch.bfloat16", (a, b, c, d, e.bfloat16(), None, *_SETTINGS[0])),
        ("update: (got shape|has)", (a, b, c, d, e[:7], None, *_SETTINGS[0])),
        ("found_inf: ", (a, b, c, d, e, None, *_SETTINGS[0], torch.ones(1, device=device))),
        ("step: got 0", (a, b, c, d, e, None, 0.9, 0.999, 1e-8, 0.0, 0, True)),
    ]


def apply_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    a, b = torch.ones(8, device=device), torch.ones(8, device=device)
    return [
        ("update: got torch.bfloat16", (a, b.bfloat16(), None, 0.1)),
        ("copy: (got shape|has)", (a, b, torch.ones(7, device=device), 0.1)),
        ("ratio: ", (a, b, None, 0.1, torch.ones(1, device=device))),
        ("found_inf: ", (a, b, None, 0.1, None, torch.ones(1, device=device))),
    ]


def floor(*args: Any) -> Floor:
    param, grad, exp_avg, exp_avg_sq, update = args[:5]
    states = exp_avg.nbytes + exp_avg_sq.nbytes
    read = param.nbytes + grad.nbytes + states
    return Floor(read, states + update.nbytes, 16 * param.numel())


def apply_floor(
    param: torch.Tensor, update: torch.Tensor, copy: torch.Tensor | None, *rest: Any
) -> Floor:
    written = param.nbytes + (copy.nbytes if copy is not None else 0)
    return Floor(param.nbytes + update.nbytes, written, 2 * param.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        (label, (param, grad, mean, square, torch.empty_like(mean), None, *_SETTINGS[0]))
        for label, param, grad, (mean, square), copy in common.benchmark_tensors(device, 2)
        if copy is None
    ]


def apply_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    numel = 10_000_000
    param, update = (randn(device, torch.float32, numel, seed=seed) for seed in (0, 1))
    copy = torch.empty(numel, dtype=torch.bfloat16, device=device)
    return [("10M float32, bfloat16 copy", (param, update, copy, 1e-6))]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor param, Tensor grad, Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, "
        "Tensor(c!) update, Tensor? grad_scale, float beta1, float beta2, float eps, "
        "float weight_decay, int step, bool bias_correction, "
        "Tensor? found_inf=None) -> Tensor",
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
        name=APPLY,
        schema="(Tensor(a!) param, Tensor update, Tensor(b!)? copy, float step_size, "
        "Tensor? ratio=None, Tensor? found_inf=None) -> ()",
        reference=apply_reference,
        fake=apply_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=apply_cases,
        refused=apply_refused,
        floor=apply_floor,
        benchmarks=apply_benchmarks,
    ),
)
