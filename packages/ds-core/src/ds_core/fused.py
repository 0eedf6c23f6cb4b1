"""Steps in one pass over memory: torch's fused kernels where they run, and richer ones.

An optimizer may do more in its pass than `torch.optim` has words for. It says what by an attribute
`step_options`, names of keyword arguments that its `step` takes:

| option       | what it is                                                              |
|--------------|-------------------------------------------------------------------------|
| `gradients`  | by parameter, used in place of `.grad`; in any float format             |
| `grad_scale` | one number that gradients are multiplied by                             |
| `copies`     | by parameter, tensors that receive its new value, rounded               |
| `found_inf`  | one number on the device: if it is not 0, nothing changes, but for a    |
|              | count of steps, which the attribute `counts_steps` tells of             |
| `undo`       | whether to keep what its `rollback()` needs; `can_roll_back` says if it has any |
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

#: With these, a step from low-precision gradients to low-precision weights is one pass.
_ONE_PASS = frozenset({"gradients", "grad_scale", "copies"})
#: How a caller chooses a kernel; whoever does is left alone.
_CHOICES = ("fused", "foreach", "capturable", "differentiable")


def prefer_fused(optimizer: Optimizer) -> None:
    """Choose torch's fused kernel for an optimizer that has taken no step, if nobody chose.

    One pass over memory in place of ten; the results differ by rounding only. Left as it is where
    `optimizer` has no such kernel, where the kernel does not run on every device and dtype of its
    parameters, and where a parameter group names a kernel itself.
    """
    cls = type(optimizer)
    if not cls.__module__.startswith("torch.") or "fused" not in inspect.signature(cls).parameters:
        return
    for group in optimizer.param_groups:
        if any(group.get(choice) not in (None, False) for choice in _CHOICES):
            return
        if group.get("fused") is False or isinstance(group["lr"], torch.Tensor):
            return
    kinds = {(p.device, p.dtype) for group in optimizer.param_groups for p in group["params"]}
    if not kinds or not all(_runs(cls, device, dtype) for device, dtype in kinds):
        return
    for group in (optimizer.defaults, *optimizer.param_groups):
        group["fused"] = True
    told: Any = optimizer
    told._step_supports_amp_scaling = True


def is_one_pass(optimizer: Optimizer) -> bool:
    """Whether `step_in_one_pass` may be called."""
    return getattr(optimizer, "step_options", frozenset()) >= _ONE_PASS


def step_in_one_pass(
    optimizer: Optimizer,
    gradients: Mapping[torch.Tensor, torch.Tensor],
    copies: Mapping[torch.Tensor, torch.Tensor],
    grad_scale: float | torch.Tensor = 1.0,
    *,
    undo: bool = False,
    unless: torch.Tensor | None = None,
) -> None:
    """`optimizer.step()` of the parameters in `gradients`, which writes their `copies` as well.

    With `undo`, which not every optimizer has, `optimizer.rollback()` takes it back. With `unless`,
    a flag on the parameters' device, for an optimizer of which `can_leave_out` is true, nothing
    happens where it is true; the host need not know.
    """
    is_one = isinstance(grad_scale, float) and grad_scale == 1.0
    target: Any = optimizer
    more: dict[str, Any] = {"undo": True} if undo else {}
    if unless is not None:
        more["found_inf"] = unless.to(torch.float32)
    target.step(
        gradients=gradients,
        copies=copies or None,
        grad_scale=None if is_one else grad_scale,
        **more,
    )


def can_undo(optimizer: Optimizer) -> bool:
    """Whether a step in one pass can keep what takes it back."""
    return is_one_pass(optimizer) and "undo" in getattr(optimizer, "step_options", frozenset())


def can_leave_out(optimizer: Optimizer) -> bool:
    """Whether a flag on the device can keep a step from changing anything.

    Not if the host counts the steps: it would count one that the device leaves out.
    """
    if not is_one_pass(optimizer):
        return fuses_scale(optimizer)
    target: Any = optimizer
    return "found_inf" in target.step_options and not target.counts_steps


def fuses_scale(optimizer: Optimizer) -> bool:
    """Whether `step_scaled` reads the gradients only once."""
    supports = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    return supports and all(group.get("fused") for group in optimizer.param_groups)


def step_scaled(optimizer: Optimizer, scale: float | torch.Tensor, device: torch.device) -> None:
    """`optimizer.step()` with gradients multiplied by `scale`, inside the fused kernel.

    Args:
        optimizer: one of which `fuses_scale` is true; others would ignore the scale.
        scale: one number.
        device: of the parameters.
    """
    target: Any = optimizer
    # torch's fused kernels divide by `grad_scale`, as a gradient scaler wants it.
    if isinstance(scale, torch.Tensor):
        inverse = scale.to(device=device, dtype=torch.float32).reciprocal()
    else:
        value = 1.0 / scale if scale else float("inf")
        inverse = torch.full((), value, dtype=torch.float32, device=device)
    target.grad_scale = inverse
    target.found_inf = torch.zeros((), dtype=torch.float32, device=device)
    try:
        target.step()
    finally:
        del target.grad_scale, target.found_inf


def step_unless(optimizer: Optimizer, skipped: torch.Tensor) -> None:
    """`optimizer.step()`, or nothing where a flag on the device says so; the host need not know.

    Args:
        optimizer: one of which `fuses_scale` is true.
        skipped: the flag: one truth value on the parameters' device.
    """
    target: Any = optimizer
    target.found_inf = skipped.to(torch.float32)
    try:
        target.step()
    finally:
        del target.found_inf


def _runs(cls: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a fused step of one element works: torch has no public table of where it does."""
    if device.type == "meta":
        return False
    probe = torch.nn.Parameter(torch.zeros(1, device=device, dtype=dtype), dtype.is_floating_point)
    probe.grad = torch.zeros_like(probe)
    try:
        cls([probe], fused=True).step()
    except RuntimeError:
        return False
    return True


def multiply(gradients: Iterable[torch.Tensor], scale: float | torch.Tensor) -> None:
    """Multiply gradients in place, in as few kernels as their devices and dtypes allow."""
    listed = list(gradients)
    if listed:
        torch._foreach_mul_(listed, scale)
