"""One step of SGD with momentum over one tensor. Source: Sutskever et al. 2013, as torch has it."""

from __future__ import annotations

from typing import Any

import torch

from ds_core.ops import optimizer_step as common
from ds_core.ops.arguments import FLOATS, expect, wide
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME = "sgd_step_"


def sgd_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum_buffer: torch.Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    copy: torch.Tensor | None = None,
    undo: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    seed: int | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Update `param` and `momentum_buffer` in one pass over memory, computed in fp32.

    Formats, `copy`, `undo`, `grad_scale`, `seed` and `found_inf` are as `adam_step_` has them. With
    g = grad * grad_scale + wd p: `b = momentum b + (1 - dampening) g`, but `b = g` in the first
    step; the direction is b, with `nesterov` `g + momentum b`, without a buffer g; `p -= lr * it`.
    A buffer is given if and only if `momentum` is not 0.
    """
    run(
        NAME,
        param,
        grad,
        momentum_buffer,
        copy,
        undo,
        grad_scale,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        first_step,
        seed,
        found_inf,
    )


def reference(
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
    """As `sgd_step_`."""
    fake(
        param,
        grad,
        momentum_buffer,
        copy,
        undo,
        grad_scale,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        first_step,
        seed,
        found_inf,
    )
    common.save_undo(undo, [param, *([] if momentum_buffer is None else [momentum_buffer])])
    p, bits = wide(param), common.bits_of(seed, param)
    g = common.effective_gradient(grad, grad_scale, maximize) + weight_decay * p
    with common.unless(found_inf, [param, momentum_buffer, copy]):
        if momentum_buffer is not None:
            buffer = g if first_step else momentum * wide(momentum_buffer) + (1 - dampening) * g
            common.store(momentum_buffer, buffer, bits, common.FIRST_STATE)
            g = g + momentum * buffer if nesterov else buffer
        common.finish(param, p - lr * g, copy, bits)


def fake(
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
    """It returns nothing; raises OpError for what does not fit."""
    states = {"momentum_buffer": momentum_buffer}
    common.check_step(
        NAME, param, grad, states, copy=copy, undo=undo, grad_scale=grad_scale, found_inf=found_inf
    )
    there = "a tensor" if momentum_buffer is not None else "None"
    wanted = f"{'a tensor' if momentum else 'None'} with momentum {momentum:g}"
    expect((momentum_buffer is not None) == (momentum != 0), NAME, "momentum_buffer", there, wanted)


#: lr, momentum, dampening, weight_decay, nesterov, maximize, first_step, seed.
_SETTINGS = (
    (1e-2, 0.9, 0.0, 0.0, False, False, False, None),
    (1e-2, 0.9, 0.0, 0.01, True, True, False, None),
    (1e-2, 0.8, 0.5, 0.1, False, False, True, None),
)
_PLAIN = (1e-2, 0.0, 0.0, 0.1, False, False, False, None)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd, single and empty sizes; mixed formats; copies; a gradient scale; no momentum; flags."""
    scale = torch.tensor(0.25, device=device)
    found: list[tuple[Any, ...]] = []
    tensors = common.tensors_of_cases(device, dtype, (False,))
    for index, (param, grad, (buffer,), copy) in enumerate(tensors):
        factor = scale if index % 2 else None
        found.append((param, grad, buffer, copy, None, factor, *_SETTINGS[index % 3]))
    for value, index in ((2.0, 2), (0.0, 4)):
        param, grad, (buffer,), copy = tensors[index]
        flag = torch.tensor(value, device=device)
        found.append((param, grad, buffer, copy, None, scale, *_SETTINGS[0], flag))
    found += [
        (param, grad, None, copy, None, scale, *_PLAIN),
        (param, grad, None, copy, None, None, *_PLAIN, flag),
    ]
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(8, device=device)
    a, b, c = x.clone(), x.clone(), x.clone()
    return [
        ("grad: (got shape|has)", (a, b[:7], c, None, None, None, *_SETTINGS[0])),
        ("momentum_buffer: got torch.float16", (a, b, c.half(), None, None, None, *_SETTINGS[0])),
        ("found_inf: ", (a, b, c, None, None, None, *_SETTINGS[0], x[:1])),
        ("momentum_buffer: got None", (a, b, None, None, None, None, *_SETTINGS[0])),
        ("momentum_buffer: got a tensor", (a, b, c, None, None, None, *_PLAIN)),
    ]


def floor(*args: Any) -> Floor:
    param, grad, buffer, copy, undo = args[:5]
    return common.step_floor(param, grad, [buffer], copy, undo, 6)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        (label, (param, grad, buffer, copy, None, None, *_SETTINGS[0]))
        for label, param, grad, (buffer,), copy in common.benchmark_tensors(device, 1)
    ]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor(a!) param, Tensor grad, Tensor(b!)? momentum_buffer, Tensor(c!)? copy, "
        "Tensor(d!)? undo, Tensor? grad_scale, float lr, float momentum, float dampening, "
        "float weight_decay, bool nesterov, bool maximize, bool first_step, int? seed, "
        "Tensor? found_inf=None) -> ()",
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
