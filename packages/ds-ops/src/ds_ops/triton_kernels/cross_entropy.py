"""Cross-entropy, with its gradient in the same program: a row is read twice and written once.

The host never waits for the device: loss and gradient of a target that is no class are NaN, and
nothing outside the row is read for it. Only in the interpreter is that an error, as on CPUs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import cross_entropy as op
from ds_core.ops.loss_arguments import check_targets, weighted_sum
from ds_ops.triton_kernels.kernel import Config, Kernel, expect_plain, types
from ds_ops.triton_kernels.launching import launch, tracing


@triton.jit
def _capped(logit, softcap, CAPPED: tl.constexpr):
    """softcap * tanh(logit / softcap), if CAPPED."""
    if CAPPED:
        logit = softcap * (2.0 / (1.0 + tl.exp(-2.0 * logit / softcap)) - 1.0)
    return logit


@triton.jit
def cross_entropy_row(
    logits,
    targets,
    scale,
    losses,
    gradient,
    classes,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    SCALES: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of one row, and with GRADIENT what the logits change of it, times scale.

    SCALES: scale has one element per row. gradient may be logits itself.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = row * classes
    target = tl.load(targets + row)
    known = (target >= 0) & (target < classes)
    own = tl.where(known, target, -1).to(tl.int32)
    # Before any gradient is written, perhaps to the same place.
    at_target = tl.load(logits + begin + own, mask=known, other=0.0).to(tl.float32)
    at_target = _capped(at_target, softcap, CAPPED)
    largest = float("-inf")
    exponentials = 0.0
    sum_of_all = 0.0
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < classes
        z = tl.load(logits + begin + column, mask=inside, other=0.0).to(tl.float32)
        z = _capped(z, softcap, CAPPED)
        sum_of_all += tl.sum(tl.where(inside, z, 0.0), axis=0)
        z = tl.where(inside, z, float("-inf"))
        larger = tl.maximum(largest, tl.max(z, axis=0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        exponentials = exponentials * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), axis=0)
        largest = larger
    counts = target != ignore_index
    lse = tl.log(exponentials) + tl.where(largest == float("-inf"), 0.0, largest)
    loss = lse - (1.0 - label_smoothing) * at_target - label_smoothing * sum_of_all / classes
    loss += z_loss * lse * lse
    loss = tl.where(known, loss, float("nan"))
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        factor = tl.load(scale + row) if SCALES else tl.load(scale)
        factor = tl.where(known, factor, float("nan"))
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < classes
            z = tl.load(logits + begin + column, mask=inside, other=0.0).to(tl.float32)
            z = _capped(z, softcap, CAPPED)
            g = tl.exp(z - lse) * (1.0 + 2.0 * z_loss * lse) - label_smoothing / classes
            g -= tl.where(column == own, 1.0 - label_smoothing, 0.0)
            if CAPPED:
                g *= 1.0 - (z / softcap) * (z / softcap)
            g = tl.where(counts, g * factor, 0.0).to(gradient.dtype.element_ty)
            tl.store(gradient + begin + column, g, mask=inside)


_CONFIGS = (
    Config({"BLOCK": 1024}, {"classes": 1024}, warps=4),
    Config({"BLOCK": 4096}, warps=8),
)
_TYPES = {
    "*bf16": "logits gradient",
    "*i64": "targets",
    "*fp32": "scale losses",
    "i32": "ignore_index",
    "i32:16": "classes",
    "fp32": "label_smoothing z_loss softcap",
}
_PLAIN, _SOFTCAP = (
    Kernel(
        cross_entropy_row,
        _CONFIGS,
        types(_TYPES, SCALES=False, GRADIENT=True, CAPPED=capped),
        variant=name,
    )
    for name, capped in (("plain", False), ("capped", True))
)
KERNELS = (_PLAIN, _SOFTCAP)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.cross_entropy.reference`."""
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    _, losses, gradient = op.fake(logits, targets, scale, *numbers, with_gradient)
    place = gradient if with_gradient else None
    total = _rows(op.NAME, logits, targets, scale, losses, place, *numbers)
    return total, losses, gradient


def cross_entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.cross_entropy.in_place_reference`."""
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    _, losses = op.in_place_fake(logits, targets, scale, *numbers)
    return _rows("cross_entropy_", logits, targets, scale, losses, logits, *numbers), losses


def _rows(
    name: str,
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    losses: torch.Tensor,
    gradient: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> torch.Tensor:
    """The sum of losses times scale, after every row's kernel has run."""
    expect_plain(name, logits=logits, targets=targets, scale=scale)
    rows, classes = logits.shape
    if logits.device.type == "cpu" and not tracing():
        check_targets(op.NAME, targets, classes, ignore_index)
    kernel = _SOFTCAP if softcap > 0 else _PLAIN
    config = kernel.config(name, logits.device, classes=classes)
    launch(
        *(kernel, config, (rows,), logits, targets, scale, losses),
        *(logits if gradient is None else gradient, classes, ignore_index),
        *(label_smoothing, z_loss, softcap),
        SCALES=scale.numel() > 1,
        CAPPED=softcap > 0,
        GRADIENT=gradient is not None,
    )
    return weighted_sum(losses, scale)
