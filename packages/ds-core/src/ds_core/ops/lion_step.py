"""One step of Lion over one tensor. Source: Chen et al. 2023, Algorithm 2."""

from __future__ import annotations

from typing import Any

import torch

from ds_core.ops import optimizer_step as common
from ds_core.ops.arguments import FLOATS, wide
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME = "lion_step_"


def lion_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    maximize: bool = False,
    copy: torch.Tensor | None = None,
    undo: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    seed: int | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Update `param` and `exp_avg` in one pass over memory, computed in fp32.

    Formats, `copy`, `undo`, `grad_scale`, `seed` and `found_inf` are as `adam_step_` has them. With
    g = grad * grad_scale: `u = sign(b1 m + (1 - b1) g)`, 0 where that is 0,
    `p = p (1 - lr wd) - lr u`, then `m = b2 m + (1 - b2) g`.
    """
    run(
        NAME,
        param,
        grad,
        exp_avg,
        copy,
        undo,
        grad_scale,
        lr,
        beta1,
        beta2,
        weight_decay,
        maximize,
        seed,
        found_inf,
    )


def reference(
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
    """As `lion_step_`."""
    fake(
        param,
        grad,
        exp_avg,
        copy,
        undo,
        grad_scale,
        lr,
        beta1,
        beta2,
        weight_decay,
        maximize,
        seed,
        found_inf,
    )
    common.save_undo(undo, [param, exp_avg])
    g, m = common.effective_gradient(grad, grad_scale, maximize), wide(exp_avg)
    update = (beta1 * m + (1 - beta1) * g).sign()
    p = wide(param) * (1 - lr * weight_decay) - lr * update
    bits = common.bits_of(seed, param)
    with common.unless(found_inf, [param, exp_avg, copy]):
        common.store(exp_avg, beta2 * m + (1 - beta2) * g, bits, common.FIRST_STATE)
        common.finish(param, p, copy, bits)


def fake(
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
    """It returns nothing; raises OpError for what does not fit."""
    states = {"exp_avg": exp_avg}
    common.check_step(
        NAME, param, grad, states, copy=copy, undo=undo, grad_scale=grad_scale, found_inf=found_inf
    )
    common.check_rates(NAME, beta1=beta1, beta2=beta2)


#: lr, beta1, beta2, weight_decay, maximize, seed.
_SETTINGS = ((1e-3, 0.9, 0.99, 0.1, False, None), (1e-2, 0.8, 0.95, 0.0, True, None))


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd, single and empty sizes; mixed formats; copies; a gradient scale; flags."""
    scale = torch.tensor(0.25, device=device)
    found: list[tuple[Any, ...]] = []
    tensors = common.tensors_of_cases(device, dtype, (False,))
    for index, (param, grad, (momentum,), copy) in enumerate(tensors):
        factor = scale if index % 2 else None
        found.append((param, grad, momentum, copy, None, factor, *_SETTINGS[index % 2]))
    for value, index in ((2.0, 2), (0.0, 4)):
        param, grad, (momentum,), copy = tensors[index]
        flag = torch.tensor(value, device=device)
        found.append((param, grad, momentum, copy, None, scale, *_SETTINGS[0], flag))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(8, device=device)
    a, b, c = x.clone(), x.clone(), x.clone()
    rest = _SETTINGS[0]
    return [
        ("grad: (got shape|has)", (a, b[:7], c, None, None, None, *rest)),
        ("exp_avg: got torch.float16", (a, b, c.half(), None, None, None, *rest)),
        ("found_inf: ", (a, b, c, None, None, None, *rest, x[:1])),
        ("beta2: got 1", (a, b, c, None, None, None, 1e-3, 0.9, 1.0, 0.0, False, None)),
    ]


def floor(*args: Any) -> Floor:
    param, grad, exp_avg, copy, undo = args[:5]
    return common.step_floor(param, grad, [exp_avg], copy, undo, 9)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        (label, (param, grad, momentum, copy, None, None, *_SETTINGS[0]))
        for label, param, grad, (momentum,), copy in common.benchmark_tensors(device, 1)
    ]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!)? copy, "
        "Tensor(d!)? undo, Tensor? grad_scale, float lr, float beta1, float beta2, "
        "float weight_decay, bool maximize, int? seed, Tensor? found_inf=None) -> ()",
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
