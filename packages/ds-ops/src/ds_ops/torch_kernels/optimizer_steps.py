"""Steps of Adam, Adagrad and SGD by torch's fused kernels, for the calls that they compute exactly.

They read and write each byte once, but only in fp32 (what they do in bf16 differs by device), and
without copy and undo buffer; by a gradient scale they divide, and write the gradient back.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_core.ops import adagrad_step as of_adagrad
from ds_core.ops import adam_step as of_adam
from ds_core.ops import sgd_step as of_sgd


def adam_refusal(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    copy: Any,
    undo: Any,
    grad_scale: Any,
    *numbers: Any,
) -> str | None:
    """Why torch's fused Adam does not compute a call, or None."""
    bias_correction = numbers[7]
    if not bias_correction:
        return "torch's kernel always corrects the bias"
    return _refusal((param, grad, exp_avg, exp_avg_sq), copy, undo, grad_scale)


def adagrad_refusal(
    param: torch.Tensor,
    grad: torch.Tensor,
    sum: torch.Tensor,
    copy: Any,
    undo: Any,
    grad_scale: Any,
    *numbers: Any,
) -> str | None:
    """Why torch's fused Adagrad does not compute a call, or None."""
    return _refusal((param, grad, sum), copy, undo, grad_scale)


def sgd_refusal(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    copy: Any,
    undo: Any,
    grad_scale: Any,
    *numbers: Any,
) -> str | None:
    """Why torch's fused SGD does not compute a call, or None."""
    states = () if momentum_buffer is None else (momentum_buffer,)
    return _refusal((param, grad, *states), copy, undo, grad_scale)


def _refusal(
    tensors: tuple[torch.Tensor, ...], copy: Any, undo: Any, grad_scale: Any
) -> str | None:
    if any(t.dtype is not torch.float32 for t in tensors):
        return "torch's kernel is exact if all tensors are in fp32"
    for name, value in (("copy", copy), ("undo", undo), ("grad_scale", grad_scale)):
        if value is not None:
            return f"torch's kernel has no {name}"
    return None


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
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        *([param], [grad], [exp_avg], [exp_avg_sq], [], [_count(param, step)]),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=maximize,
        found_inf=_flag(found_inf),
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
    torch._fused_adagrad_(
        *([param], [grad], [sum], [_count(param, step)]),
        lr=lr,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
        found_inf=_flag(found_inf),
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
    torch._fused_sgd_(
        *([param], [grad], [] if momentum_buffer is None else [momentum_buffer]),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=nesterov,
        maximize=maximize,
        is_first_step=first_step,
        found_inf=_flag(found_inf),
    )


def _count(param: torch.Tensor, step: int) -> torch.Tensor:
    """The number of a step where torch's kernels look for it."""
    return torch.full((), float(step), device=param.device)


def _flag(found_inf: torch.Tensor | None) -> torch.Tensor | None:
    """1 for anything but 0: torch's kernels only leave a step out for 1."""
    return None if found_inf is None else (found_inf != 0).float()
