"""What the ops of losses share: checks of their arguments, and gradients that are known early.

A loss that is one number has its gradient computed with it, in the forward pass, as if that number
were differentiated by itself. The backward then has little to do: multiply by what arrives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ds_core.ops.arguments import expect, expect_together

REDUCTIONS = ("mean", "sum", "none")


def check_loss(
    op: str,
    first: torch.Tensor,
    rows: int,
    targets: torch.Tensor,
    scale: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Raise OpError unless targets, scale and numbers are such as losses of `rows` rows take."""
    integers = (torch.int64, torch.int32)
    expect(targets.dtype in integers, op, "targets", targets.dtype, "torch.int64 or torch.int32")
    expect(targets.numel() == rows, op, "targets", f"shape {list(targets.shape)}", [rows])
    wide = (torch.float32, torch.float64)
    expect(scale.dtype in wide, op, "scale", scale.dtype, "torch.float32")
    fits = scale.numel() in (1, rows)
    expect(fits, op, "scale", f"{scale.numel()} elements", f"1 or {rows}")
    expect_together(op, first, targets=targets, scale=scale)
    expect(0 <= label_smoothing <= 1, op, "label_smoothing", label_smoothing, "0 to 1")
    expect(z_loss >= 0, op, "z_loss", z_loss, "0 or more")
    expect(softcap >= 0, op, "softcap", softcap, "0 or more")


def check_targets(op: str, targets: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Raise OpError for the first target that is no class. Waits for the device.

    On a GPU only references do so: a kernel there makes the losses of such targets NaN.
    """
    bad = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if bool(bad.any()):
        index = int(bad.flatten().nonzero()[0])
        got = f"{int(targets.flatten()[index])} at index {index}"
        expect(False, op, "targets", got, f"0 to {classes - 1} or ignore_index {ignore_index}")


def reduction_scale(targets: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    """What every loss is multiplied by before they are added up, `[1]`, fp32.

    Of a mean it is 1 / the number of rows that are not ignored: infinite if all are, so that such a
    mean is NaN, as torch's is.
    """
    if reduction == "mean":
        return (targets != ignore_index).sum().float().reciprocal().view(1)
    return torch.ones(1, device=targets.device)


def weighted_sum(losses: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The sum of losses times scale; of no loss at an infinite scale it is NaN."""
    if scale.numel() == 1:
        return losses.sum() * scale.view(())
    return (losses * scale).sum()


def row_factors(
    grad_total: torch.Tensor | None, grad_losses: torch.Tensor | None, scale: torch.Tensor
) -> torch.Tensor | None:
    """What each row's gradient is multiplied by, from gradients of the total and of each loss."""
    if grad_total is None:
        return None if grad_losses is None else grad_losses.contiguous()
    total = grad_total * scale
    return (total if grad_losses is None else total + grad_losses).contiguous()


def scaled(
    ctx: Any, saved: Sequence[torch.Tensor | None], factor: torch.Tensor
) -> list[torch.Tensor | None]:
    """Gradients that were computed for a factor of 1, for this one.

    In place where that is safe, for they are as large as what they belong to: at the first backward
    of a graph. A second one (retain_graph) gets tensors of its own, from the same values.
    """
    if type(factor) is torch.Tensor and factor.device.type == "cpu":  # not while it is traced
        value = float(factor)
        applied = getattr(ctx, "applied", None)
        if applied is None and value != 0 and math.isfinite(value):
            ctx.applied = value
            for t in saved:
                if t is not None and value != 1:
                    t.data.mul_(value)  # .data: what was saved is meant to change
            return list(saved)
        factor = factor / (applied or 1.0)
    return [None if t is None else t * factor for t in saved]
