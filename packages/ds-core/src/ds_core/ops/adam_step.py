"""One step of Adam or AdamW over one tensor. Source: Kingma and Ba 2015, Algorithm 1."""

from __future__ import annotations

import math
from typing import Any

import torch

from ds_core.ops import optimizer_step as common
from ds_core.ops.arguments import FLOATS, wide
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME = "adam_step_"


def adam_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    bias_correction: bool = True,
    maximize: bool = False,
    copy: torch.Tensor | None = None,
    undo: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    seed: int | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Update `param`, `exp_avg` and `exp_avg_sq` in one pass over memory, computed in fp32.

    Args:
        param: any shape, contiguous; fp32, bf16 or fp16, as `grad`, each for itself.
        exp_avg, exp_avg_sq: both fp32 or both bf16.
        step: counts this one, from 1.
        decoupled: `weight_decay` shrinks the parameter (AdamW), else it adds to the gradient.
        copy: receives the new parameter, rounded to nearest.
        undo: uint8, receives the old bytes of param, exp_avg and exp_avg_sq, back to back, for
            `step_undo_`.
        grad_scale: 0-dim fp32, a factor on the gradient.
        seed: param and states in bf16 are rounded stochastically, by bits that depend only on it
            and on an element's position; None: to nearest.
        found_inf: 0-dim fp32, as torch.amp has it: if it is not 0, param, states and copy stay as
            they are (`undo` gets their bytes in any case).

    With g = grad * grad_scale: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, and
    `p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.
    """
    run(
        NAME,
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        copy,
        undo,
        grad_scale,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        decoupled,
        bias_correction,
        maximize,
        seed,
        found_inf,
    )


def reference(
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
    """As `adam_step_`."""
    fake(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        copy,
        undo,
        grad_scale,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        decoupled,
        bias_correction,
        maximize,
        seed,
        found_inf,
    )
    common.save_undo(undo, [param, exp_avg, exp_avg_sq])
    g, p = common.effective_gradient(grad, grad_scale, maximize), wide(param)
    if decoupled:
        p = p * (1 - lr * weight_decay)
    elif weight_decay:
        g = g + weight_decay * p
    mean = beta1 * wide(exp_avg) + (1 - beta1) * g
    square = beta2 * wide(exp_avg_sq) + (1 - beta2) * g * g
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    p = p - lr / first * (mean / (square.sqrt() / math.sqrt(second) + eps))
    bits = common.bits_of(seed, param)
    with common.unless(found_inf, [param, exp_avg, exp_avg_sq, copy]):
        common.store(exp_avg, mean, bits, common.FIRST_STATE)
        common.store(exp_avg_sq, square, bits, common.SECOND_STATE)
        common.finish(param, p, copy, bits)


def fake(
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
    """It returns nothing; raises OpError for what does not fit."""
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    common.check_step(
        NAME, param, grad, states, copy=copy, undo=undo, grad_scale=grad_scale, found_inf=found_inf
    )
    common.check_rates(NAME, beta1=beta1, beta2=beta2, eps=eps, step=step)


#: lr, beta1, beta2, eps, weight_decay, step, decoupled, bias_correction, maximize, seed.
_SETTINGS = (
    (1e-3, 0.9, 0.999, 1e-8, 0.01, 1, True, True, False, None),
    (1e-2, 0.8, 0.95, 1e-6, 0.1, 7, False, True, True, None),
    (1e-3, 0.9, 0.999, 1e-8, 0.0, 1000, True, False, False, None),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd, single and empty sizes; mixed formats; copies; a gradient scale; all switches; flags."""
    found: list[tuple[Any, ...]] = []
    scale = torch.tensor(0.25, device=device)
    tensors = common.tensors_of_cases(device, dtype, (False, True))
    for index, (param, grad, (mean, square), copy) in enumerate(tensors):
        settings = _SETTINGS[index % len(_SETTINGS)]
        factor = scale if index % 2 else None
        found.append((param, grad, mean, square, copy, None, factor, *settings))
    for value, index in ((2.0, 2), (0.0, 4)):
        param, grad, (mean, square), copy = tensors[index]
        flag = torch.tensor(value, device=device)
        found.append((param, grad, mean, square, copy, None, scale, *_SETTINGS[0], flag))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(8, device=device)
    return [
        ("param: got torch.int64", _call(param=x.long())),
        ("grad: (got shape|has)", _call(grad=x[:7])),
        ("exp_avg: got torch.float16", _call(exp_avg=x.half(), exp_avg_sq=x.half())),
        ("exp_avg_sq: got torch.bfloat16", _call(exp_avg_sq=x.bfloat16())),
        ("copy: (got shape|has)", _call(copy=x[:7].clone())),
        ("undo: (got shape|has)", _call(undo=torch.empty(95, dtype=torch.uint8, device=device))),
        ("grad_scale: ", _call(grad_scale=torch.ones(2, device=device))),
        ("found_inf: ", _call(found_inf=torch.ones(2, device=device))),
        ("found_inf: ", _call(found_inf=torch.ones((), dtype=torch.int64, device=device))),
        ("grad: ", _call(grad=torch.ones(16, device=device)[::2])),
        ("step: got 0", _call(step=0)),
        ("beta1: got 1", _call(beta1=1.0)),
    ]


def _call(**changed: Any) -> tuple[Any, ...]:
    """Arguments of an ordinary call of 8 elements, some of them changed."""
    device = next((t.device for t in changed.values() if torch.is_tensor(t)), torch.device("cpu"))
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    values: dict[str, Any] = {name: torch.ones(8, device=device) for name in names}
    values |= {"copy": None, "undo": None, "grad_scale": None}
    values |= {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    values |= {"step": 1, "decoupled": True, "bias_correction": True, "maximize": False}
    values |= {"seed": None, "found_inf": None, **changed}
    return tuple(values.values())


def floor(*args: Any) -> Floor:
    param, grad, exp_avg, exp_avg_sq, copy, undo = args[:6]
    return common.step_floor(param, grad, [exp_avg, exp_avg_sq], copy, undo, 13)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        (label, (param, grad, mean, square, copy, None, None, *_SETTINGS[0]))
        for label, param, grad, (mean, square), copy in common.benchmark_tensors(device, 2)
    ]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
        "Tensor(d!)? copy, Tensor(e!)? undo, Tensor? grad_scale, float lr, float beta1, "
        "float beta2, float eps, float weight_decay, int step, bool decoupled, "
        "bool bias_correction, bool maximize, int? seed, Tensor? found_inf=None) -> ()",
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
