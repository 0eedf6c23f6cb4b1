"""Cross-entropy whose gradient is computed with the loss, in one pass over the logits.

Sources: label smoothing: Szegedy et al. 2016, section 7; z-loss: Chowdhery et al. 2022 (PaLM),
section 5; soft-capped logits: Gemma Team 2024 (Gemma 2), section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ds_core.ops.arguments import FLOATS, expect, expect_float, randn, unaligned, wide, wide_dtype
from ds_core.ops.loss_arguments import (
    REDUCTIONS,
    check_loss,
    check_targets,
    reduction_scale,
    row_factors,
    scaled,
    weighted_sum,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "cross_entropy"


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """`log(sum(e^logits)) - logits[target]` of each row, reduced; computed in fp32.

    Args:
        logits: `[..., classes]`, any float dtype.
        targets: `[...]`, int64 or int32: a class, or `ignore_index` for rows that do not count.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.
        z_loss: adds this times `log(sum(e^logits))^2`, which keeps logits small.
        softcap: above 0, logits count as `softcap * tanh(logits / softcap)`.
        reduction: "mean" over rows that count (NaN if none does), "sum", or "none".

    Returns fp32: a scalar, or `[...]` with 0 for ignored rows. Differentiable in logits. With
    "mean" and "sum" the forward computes the gradient as well and keeps that in place of the
    logits; with "none" the backward reads the logits again. Without grad there is no gradient
    work. Raises OpError naming the first target that is no class. On a GPU, whose targets the host
    would have to wait for, loss and gradient of such a row are NaN instead.
    """
    expect(reduction in REDUCTIONS, NAME, "reduction", reduction, " or ".join(REDUCTIONS))
    expect(logits.dim() >= 1, NAME, "logits", "a scalar", "[..., classes]")
    shape = targets.shape
    fits = logits.shape[:-1] == shape
    expect(fits, NAME, "targets", f"shape {list(shape)}", list(logits.shape[:-1]))
    flat = logits.contiguous().flatten(0, -2) if logits.dim() > 1 else logits.unsqueeze(0)
    targets = targets.contiguous().view(-1)
    now = reduction != "none" and torch.is_grad_enabled() and logits.requires_grad
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    scale = reduction_scale(targets, ignore_index, reduction)
    total, losses, _ = run(NAME, flat, targets, scale, *numbers, now)
    result: torch.Tensor = losses.view(shape) if reduction == "none" else total
    return result


def reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The total, the losses and the gradient of the total.

    logits: `[n, classes]`; targets: `[n]`; scale: `[1]` or `[n]`, fp32. With z = logits, or
    `softcap tanh(logits / softcap)` if softcap > 0, and lse = log(sum(e^z)), the loss of a row is

    `lse - (1 - s) z[target] - s mean(z) + z_loss lse^2`, s = label_smoothing; ignored: 0.

    total = sum(losses * scale), a scalar, NaN for a scale of 1 / 0; losses `[n]`, both fp32. Only
    with_gradient: the gradient of the total, like logits; else empty, `[0]`. A target that is no
    class is an OpError; kernels for GPUs make loss and gradient of its row NaN, and do not wait.
    """
    _check(logits, targets, scale, label_smoothing, z_loss, softcap)
    check_targets(NAME, targets, logits.shape[1], ignore_index)
    values = wide(logits)
    if softcap > 0:
        values = softcap * torch.tanh(values / softcap)
    counts = targets != ignore_index
    target = torch.where(counts, targets, 0).long().unsqueeze(-1)
    lse = torch.logsumexp(values, dim=-1)
    losses = lse - (1 - label_smoothing) * values.gather(-1, target).squeeze(-1)
    losses = losses - label_smoothing * values.mean(-1) if label_smoothing else losses
    losses = torch.where(counts, losses + z_loss * lse.square(), 0.0)
    total = weighted_sum(losses, scale.detach())
    if not with_gradient:
        return total, losses, logits.new_empty(0)
    gradient = torch.softmax(values.detach(), dim=-1) * (1 + 2 * z_loss * lse.detach()).unsqueeze(
        -1
    )
    one_hot = F.one_hot(target.squeeze(-1), logits.shape[1])
    gradient = gradient - (1 - label_smoothing) * one_hot - label_smoothing / logits.shape[1]
    if softcap > 0:
        gradient = gradient * (1 - (values / softcap).square())
    gradient = torch.where(counts.unsqueeze(-1), gradient * scale.unsqueeze(-1), 0.0)
    return total, losses, gradient.to(logits.dtype)


def in_place_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Total and losses as of `cross_entropy`; the gradient takes the place of the logits."""
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    total, losses, gradient = reference(logits, targets, scale, *numbers, True)
    logits.copy_(gradient)
    return total, losses


def _check(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    expect_float(NAME, "logits", logits)
    expect(logits.dim() == 2, NAME, "logits", f"shape {list(logits.shape)}", "[tokens, classes]")
    rows = logits.shape[0]
    check_loss(NAME, logits, rows, targets, scale, label_smoothing, z_loss, softcap)


def fake(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(logits, targets, scale, label_smoothing, z_loss, softcap)
    dtype = wide_dtype(logits.dtype)
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    return logits.new_empty((), dtype=dtype), logits.new_empty(len(logits), dtype=dtype), gradient


def in_place_fake(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    return fake(logits, targets, scale, *numbers, False)[:2]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, targets, scale, *ctx.numbers, ctx.now = inputs
    _, losses, gradient = output
    ctx.set_materialize_grads(False)
    if ctx.now:
        ctx.mark_non_differentiable(losses, gradient)
        ctx.save_for_backward(gradient)
    else:
        ctx.mark_non_differentiable(gradient)
        ctx.save_for_backward(logits, targets, scale)


def _backward(
    call: Callable[..., Any],
    ctx: Any,
    grad_total: torch.Tensor | None,
    grad_losses: torch.Tensor | None,
    _: Any,
) -> Any:
    dlogits = None
    if ctx.now and grad_total is not None:
        (dlogits,) = scaled(ctx, ctx.saved_tensors, grad_total)
    elif not ctx.now:
        logits, targets, scale = ctx.saved_tensors
        rows = row_factors(grad_total, grad_losses, scale)
        if rows is not None:
            dlogits = call(NAME, logits, targets, rows, *ctx.numbers, True)[2]
    return dlogits, *[None] * 7


#: rows, classes, ignore_index, label_smoothing, z_loss, softcap
_SHAPES = (
    (4, 64, -100, 0.0, 0.0, 0.0),
    (3, 127, -100, 0.1, 0.0, 0.0),
    (5, 5003, 3, 0.2, 1e-2, 0.0),
    (4, 2048, 0, 0.0, 0.0, 5.0),
    (2, 2051, 0, 0.1, 1e-3, 3.0),
    (2, 1, -100, 0.0, 0.0, 0.0),
    (0, 8, -100, 0.0, 0.0, 0.0),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd and several blocks of classes, every option, ignored rows, both integers, unaligned."""
    found: list[tuple[Any, ...]] = []
    for rows, classes, ignore_index, *numbers in _SHAPES:
        for now in (False, True):
            logits = randn(device, dtype, rows, classes) * 3
            targets = (torch.arange(rows, device=device) * 7 + classes // 2) % classes
            if rows > 3:
                targets[1] = ignore_index
            scale = torch.full((1,), 0.5, device=device)
            found.append((logits, targets, scale, ignore_index, *numbers, now))
    logits, targets, scale, *rest = found[2]
    weights = torch.linspace(-1, 1, len(logits), device=device)
    return [
        *found,
        (unaligned(logits), targets.int(), scale, *rest),
        (logits, targets, weights, *rest[:-1], True),
    ]


def in_place_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [args[:-1] for args in cases(device, dtype) if args[-1]]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(3, 8, device=device)
    t = torch.zeros(3, dtype=torch.int64, device=device)
    one = torch.ones(1, device=device)
    numbers = (-100, 0.0, 0.0, 0.0)
    found = [
        ("logits: got torch.int64", (x.long(), t, one, *numbers, False)),
        (r"logits: got shape \[8\]", (x[0], t[:1], one, *numbers, False)),
        ("targets: got torch.float32", (x, t.float(), one, *numbers, False)),
        (r"targets: (got shape \[2\]|has 2)", (x, t[:2], one, *numbers, False)),
        ("scale: (got|has) 2", (x, t, torch.ones(2, device=device), *numbers, True)),
        ("label_smoothing: got 1.5", (x, t, one, -100, 1.5, 0.0, 0.0, False)),
        ("z_loss: got -1", (x, t, one, -100, 0.0, -1.0, 0.0, False)),
        ("softcap: got -1", (x, t, one, -100, 0.0, 0.0, -1.0, False)),
    ]
    if device.type == "cpu":
        bad = torch.tensor([0, 8, 9])
        found += [
            ("targets: got 8 at index 1, expected 0 to 7", (x, bad, one, *numbers, False)),
            ("targets: got -1 at index 0", (x, t - 1, one, *numbers, True)),
        ]
    return found


def in_place_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [(message, args[:-1]) for message, args in refused(device) if "int64" not in message]


def floor(logits: torch.Tensor, targets: torch.Tensor, *rest: Any) -> Floor:
    return Floor(logits.nbytes, logits.nbytes if rest[-1] is True else 0, 20 * logits.numel())


def in_place_floor(logits: torch.Tensor, targets: torch.Tensor, *rest: Any) -> Floor:
    return Floor(logits.nbytes, logits.nbytes, 20 * logits.numel())


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for classes, dtype in (
        (32000, torch.float32),
        (32000, torch.bfloat16),
        (50257, torch.bfloat16),
    ):
        logits = randn(device, dtype, 1024, classes)
        targets = torch.arange(1024, device=device)
        scale = torch.full((1,), 1 / 1024, device=device)
        label = f"1024x{classes} {str(dtype)[6:]} with gradient"
        found.append((label, (logits, targets, scale, -100, 0.0, 0.0, 0.0, True)))
    return found


def in_place_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [(label, args[:-1]) for label, args in benchmarks(device)[:2]]


_OPTIONS = (
    "Tensor targets, Tensor scale, int ignore_index, float label_smoothing, float z_loss, "
    "float softcap"
)

OPS = (
    Op(
        name=NAME,
        schema=f"(Tensor logits, {_OPTIONS}, bool with_gradient) -> (Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
        autograd=Autograd(_setup, _backward),
    ),
    Op(
        name="cross_entropy_",
        schema=f"(Tensor(a!) logits, {_OPTIONS}) -> (Tensor, Tensor)",
        reference=in_place_reference,
        fake=in_place_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=in_place_cases,
        refused=in_place_refused,
        floor=in_place_floor,
        benchmarks=in_place_benchmarks,
    ),
)
