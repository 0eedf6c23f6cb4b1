"""One step of Adagrad over one tensor. Source: Duchi, Hazan and Singer 2011, equation 1."""

from __future__ import annotations

from typing import Any

import torch

from ds_core.ops import optimizer_step as common
from ds_core.ops.arguments import FLOATS, wide
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME = "adagrad_step_"


def adagrad_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    sum: torch.Tensor,
    *,
    step: int,
    lr: float,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    maximize: bool = False,
    copy: torch.Tensor | None = None,
    undo: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    seed: int | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Update `param` and `sum`, of squared gradients, in one pass over memory, computed in fp32.

    Formats, `copy`, `undo`, `grad_scale`, `seed` and `found_inf` are as `adam_step_` has them. With
    g = grad * grad_scale + wd p: `s = s + g^2`, and
    `p = p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)`.
    """
    run(
        NAME,
        param,
        grad,
        sum,
        copy,
        undo,
        grad_scale,
        lr,
        lr_decay,
        eps,
        weight_decay,
        step,
        maximize,
        seed,
        found_inf,
    )


def reference(
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
    """As `adagrad_step_`."""
    fake(
        param,
        grad,
        sum,
        copy,
        undo,
        grad_scale,
        lr,
        lr_decay,
        eps,
        weight_decay,
        step,
        maximize,
        seed,
        found_inf,
    )
    common.save_undo(undo, [param, sum])
    p = wide(param)
    g = common.effective_gradient(grad, grad_scale, maximize) + weight_decay * p
    total = wide(sum) + g * g
    p = p - lr / (1 + (step - 1) * lr_decay) * (g / (total.sqrt() + eps))
    bits = common.bits_of(seed, param)
    with common.unless(found_inf, [param, sum, copy]):
        common.store(sum, total, bits, common.FIRST_STATE)
        common.finish(param, p, copy, bits)


def fake(
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
    """It returns nothing; raises OpError for what does not fit."""
    states = {"sum": sum}
    common.check_step(
        NAME, param, grad, states, copy=copy, undo=undo, grad_scale=grad_scale, found_inf=found_inf
    )
    common.check_rates(NAME, lr_decay=lr_decay, eps=eps, step=step)


#: lr, lr_decay, eps, weight_decay, step, maximize, seed.
_SETTINGS = (
    (1e-2, 0.0, 1e-10, 0.0, 1, False, None),
    (1e-2, 0.1, 1e-6, 0.01, 9, True, None),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd, single and empty sizes; mixed formats; copies; a gradient scale; flags."""
    scale = torch.tensor(0.25, device=device)
    found: list[tuple[Any, ...]] = []
    tensors = common.tensors_of_cases(device, dtype, (True,))
    for index, (param, grad, (total,), copy) in enumerate(tensors):
        factor = scale if index % 2 else None
        found.append((param, grad, total, copy, None, factor, *_SETTINGS[index % 2]))
    for value, index in ((2.0, 2), (0.0, 4)):
        param, grad, (total,), copy = tensors[index]
        flag = torch.tensor(value, device=device)
        found.append((param, grad, total, copy, None, scale, *_SETTINGS[0], flag))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(8, device=device)
    a, b, c = x.clone(), x.clone(), x.clone()
    rest = _SETTINGS[0]
    return [
        ("grad: (got shape|has)", (a, b[:7], c, None, None, None, *rest)),
        ("sum: got torch.float16", (a, b, c.half(), None, None, None, *rest)),
        ("found_inf: ", (a, b, c, None, None, None, *rest, x[:1])),
        ("step: got 0", (a, b, c, None, None, None, 1e-2, 0.0, 1e-10, 0.0, 0, False, None)),
    ]


def floor(*args: Any) -> Floor:
    param, grad, total, copy, undo = args[:5]
    return common.step_floor(param, grad, [total], copy, undo, 8)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        (label, (param, grad, total, copy, None, None, *_SETTINGS[0]))
        for label, param, grad, (total,), copy in common.benchmark_tensors(device, 1)
    ]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor(a!) param, Tensor grad, Tensor(b!) sum, Tensor(c!)? copy, "
        "Tensor(d!)? undo, Tensor? grad_scale, float lr, float lr_decay, float eps, "
        "float weight_decay, int step, bool maximize, int? seed, Tensor? found_inf=None) -> ()",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
    ),
)
