"""Steps of Adam, Lion, Adagrad and SGD in one pass over memory, and taking one back.

A step of Adam from a bf16 gradient, with a bf16 copy, moves 28 bytes per element: 14 in, 14 out.
The arithmetic, a root and a division among it, hides behind them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ds_core.ops import adagrad_step as of_adagrad
from ds_core.ops import adam_step as of_adam
from ds_core.ops import lion_step as of_lion
from ds_core.ops import sgd_step as of_sgd
from ds_core.ops import step_undo as of_undo
from ds_core.ops.arguments import expect
from ds_ops.triton_kernels.kernel import Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.optimizer_programs import (
    adagrad_elements,
    adam_elements,
    lion_elements,
    sgd_elements,
    undo_elements,
)
from ds_ops.triton_kernels.stepping import (
    CONFIGS,
    cut,
    kept_parts,
    parts,
    run,
)

_COMMON = {"i32": "k0 k1", "i32:16": "numel"}
#: As in mixed precision, with a factor and a flag; and with everything in bf16, and undone maybe.
_MIXED = {"COPY": True, "KEPT": False, "SCALED": True, "FLAGGED": True, "SEEDED": False}
_LOW = {"COPY": False, "KEPT": True, "SCALED": False, "FLAGGED": False, "SEEDED": True}
_RATES = "sign beta1 rest1 beta2 rest2 eps step_size root_scale decay l2"

_ADAM = Kernel(
    adam_elements,
    CONFIGS,
    types(
        {
            "*bf16": "grad copy",
            "*fp32": "param exp_avg exp_avg_sq kept_param kept_avg kept_sq grad_scale found_inf",
            **_COMMON,
            "fp32": _RATES,
        },
        **_MIXED,
        COUPLED=False,
    ),
    variant="mixed",
)
_ADAM_LOW = Kernel(
    adam_elements,
    CONFIGS,
    types(
        {
            "*bf16": "param grad exp_avg exp_avg_sq copy kept_param kept_avg kept_sq",
            "*fp32": "grad_scale found_inf",
            **_COMMON,
            "fp32": _RATES,
        },
        **_LOW,
        COUPLED=False,
    ),
    variant="low",
)
_LION = Kernel(
    lion_elements,
    CONFIGS,
    types(
        {
            "*bf16": "grad copy",
            "*fp32": "param exp_avg kept_param kept_avg grad_scale found_inf",
            **_COMMON,
            "fp32": "sign beta1 rest1 beta2 rest2 lr decay",
        },
        **_MIXED,
    ),
)
_ADAGRAD = Kernel(
    adagrad_elements,
    CONFIGS,
    types(
        {
            "*bf16": "grad copy",
            "*fp32": "param total kept_param kept_total grad_scale found_inf",
            **_COMMON,
            "fp32": "sign lr eps l2",
        },
        **_MIXED,
        COUPLED=True,
    ),
)
_SGD = Kernel(
    sgd_elements,
    CONFIGS,
    types(
        {
            "*bf16": "grad copy",
            "*fp32": "param buffer kept_param kept_buffer grad_scale found_inf",
            **_COMMON,
            "fp32": "sign lr l2 momentum rest first",
        },
        **_MIXED,
        COUPLED=True,
        BUFFERED=True,
        NESTEROV=False,
    ),
)
_UNDO = Kernel(
    undo_elements,
    CONFIGS,
    types(
        {
            "*bf16": "copy",
            "*fp32": "param first second kept_param kept_first kept_second",
            "i32:16": "numel",
        },
        STATES=2,
        COPY=True,
    ),
)
KERNELS = (_ADAM, _ADAM_LOW, _LION, _ADAGRAD, _SGD, _UNDO)


def adam_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    copy: torch.Tensor | None,
    undo: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
    bias_correction: bool,
    maximize: bool,
    seed: int | None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """As `ds_core.ops.adam_step.reference`."""
    tensors = (param, grad, exp_avg, exp_avg_sq, copy, undo, grad_scale)
    rates: tuple[Any, ...] = (lr, beta1, beta2, eps, weight_decay, step)
    rest: tuple[Any, ...] = (decoupled, bias_correction, maximize, seed, found_inf)
    of_adam.fake(*tensors, *rates, *rest)
    expect_plain(of_adam.NAME, param=param, grad=grad, copy=copy)
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    run(
        _ADAM,
        of_adam.NAME,
        param,
        [grad, exp_avg, exp_avg_sq, copy, *kept_parts(undo, (param, exp_avg, exp_avg_sq))],
        [grad_scale, found_inf],
        [
            *(_sign(maximize), beta1, 1 - beta1, beta2, 1 - beta2, eps),
            *(lr / first, 1 / math.sqrt(second)),
            *(1 - lr * weight_decay if decoupled else 1.0, weight_decay),
        ],
        seed,
        COUPLED=not decoupled and weight_decay != 0,
        **_flags(copy, undo, grad_scale, found_inf, seed),
    )


def lion_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    copy: torch.Tensor | None,
    undo: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
    seed: int | None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """As `ds_core.ops.lion_step.reference`."""
    tensors = (param, grad, exp_avg, copy, undo, grad_scale)
    of_lion.fake(*tensors, lr, beta1, beta2, weight_decay, maximize, seed, found_inf)
    expect_plain(of_lion.NAME, param=param, grad=grad, copy=copy)
    run(
        _LION,
        of_lion.NAME,
        param,
        [grad, exp_avg, copy, *kept_parts(undo, (param, exp_avg))],
        [grad_scale, found_inf],
        [_sign(maximize), beta1, 1 - beta1, beta2, 1 - beta2, lr, 1 - lr * weight_decay],
        seed,
        **_flags(copy, undo, grad_scale, found_inf, seed),
    )


def adagrad_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    sum: torch.Tensor,
    copy: torch.Tensor | None,
    undo: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool,
    seed: int | None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """As `ds_core.ops.adagrad_step.reference`."""
    tensors = (param, grad, sum, copy, undo, grad_scale)
    of_adagrad.fake(*tensors, lr, lr_decay, eps, weight_decay, step, maximize, seed, found_inf)
    expect_plain(of_adagrad.NAME, param=param, grad=grad, copy=copy)
    run(
        _ADAGRAD,
        of_adagrad.NAME,
        param,
        [grad, sum, copy, *kept_parts(undo, (param, sum))],
        [grad_scale, found_inf],
        [_sign(maximize), lr / (1 + (step - 1) * lr_decay), eps, weight_decay],
        seed,
        COUPLED=weight_decay != 0,
        **_flags(copy, undo, grad_scale, found_inf, seed),
    )


def sgd_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    copy: torch.Tensor | None,
    undo: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    seed: int | None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """As `ds_core.ops.sgd_step.reference`."""
    tensors = (param, grad, momentum_buffer, copy, undo, grad_scale)
    rates: tuple[Any, ...] = (lr, momentum, dampening, weight_decay)
    rest: tuple[Any, ...] = (nesterov, maximize, first_step, seed, found_inf)
    of_sgd.fake(*tensors, *rates, *rest)
    expect_plain(of_sgd.NAME, param=param, grad=grad, copy=copy)
    kept = (param,) if momentum_buffer is None else (param, momentum_buffer)
    places = kept_parts(undo, kept)
    run(
        _SGD,
        of_sgd.NAME,
        param,
        [grad, momentum_buffer, copy, places[0], places[-1]],
        [grad_scale, found_inf],
        [_sign(maximize), lr, weight_decay, momentum, 1 - dampening, float(first_step)],
        seed,
        COUPLED=weight_decay != 0,
        BUFFERED=momentum_buffer is not None,
        NESTEROV=nesterov,
        **_flags(copy, undo, grad_scale, found_inf, seed),
    )


def step_undo_(
    param: torch.Tensor,
    states: list[torch.Tensor],
    copy: torch.Tensor | None,
    undo: torch.Tensor,
) -> None:
    """As `ds_core.ops.step_undo.reference`, for at most two states."""
    name = of_undo.NAME
    of_undo.fake(param, states, copy, undo)
    expect(len(states) <= 2, name, "states", f"{len(states)} tensors", "two at most")
    named = dict(zip(("states[0]", "states[1]"), states, strict=False))
    expect_plain(name, param=param, copy=copy, **named)
    numel, config = param.numel(), _UNDO.config(name, param.device)
    kept = [param, *states]
    places = [part for part in kept_parts(undo, kept) if part is not None]
    spare = [param] * (3 - len(kept))
    every = [*kept, *spare, param if copy is None else copy, *places, *spare]
    for begin, end in parts(numel):
        own = every if end - begin == numel else [cut(t, numel, begin, end) for t in every]
        launch(
            *(_UNDO, config, (blocks(end - begin, config.constants["BLOCK"]),)),
            *(*own, end - begin),
            STATES=len(states),
            COPY=copy is not None,
        )


def _sign(maximize: bool) -> float:
    return -1.0 if maximize else 1.0


def _flags(
    copy: torch.Tensor | None,
    undo: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    seed: int | None,
) -> dict[str, bool]:
    return {
        "COPY": copy is not None,
        "KEPT": undo is not None,
        "SCALED": grad_scale is not None,
        "FLAGGED": found_inf is not None,
        "SEEDED": seed is not None,
    }
