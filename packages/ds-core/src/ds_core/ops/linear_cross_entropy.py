"""Cross-entropy of a linear layer's outputs, which are never all in memory.

Source: Wijmans et al. 2024 (Cut Your Losses in Large-Vocabulary Language Models), section 3: the
logits of a few tokens at a time are enough for the loss, and for its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ds_core.ops import cross_entropy as loss
from ds_core.ops.arguments import (
    FLOATS,
    compact,
    expect,
    expect_float,
    expect_shape,
    expect_together,
    randn,
    wide,
    wide_dtype,
)
from ds_core.ops.loss_arguments import (
    REDUCTIONS,
    check_loss,
    reduction_scale,
    row_factors,
    scaled,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
) -> torch.Tensor:
    """`cross_entropy(hidden @ weight.T + bias, targets)` without the logits of all tokens.

    Args:
        hidden: `[..., d]`, any float dtype.
        weight, bias: `[classes, d]` and `[classes]`, of hidden's dtype.
        targets: `[...]`, int64 or int32: a class, or `ignore_index`.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as of `cross_entropy`.
        chunk: tokens whose logits are in memory at a time; None: a quarter of them, at most 1024.

    Returns fp32: a scalar, or `[...]` with 0 for ignored tokens. Differentiable in hidden, weight
    and bias. With "mean" and "sum" the forward computes the gradients of what requires one, and
    the backward only scales them; with "none" the backward computes each chunk's logits again.
    Memory besides the gradients: `chunk * classes` elements. Without grad there is no gradient
    work. Raises OpError naming the first target that is no class. On a GPU, whose targets the host
    would have to wait for, loss and gradients that such a token has a part in are NaN instead.
    """
    expect(reduction in REDUCTIONS, NAME, "reduction", reduction, " or ".join(REDUCTIONS))
    expect(hidden.dim() >= 1, NAME, "hidden", "a scalar", "[..., d]")
    expect(chunk is None or chunk >= 1, NAME, "chunk", chunk, "None, or 1 or more")
    shape = targets.shape
    fits = hidden.shape[:-1] == shape
    expect(fits, NAME, "targets", f"shape {list(shape)}", list(hidden.shape[:-1]))
    flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    targets = targets.contiguous().view(-1)
    given = (hidden, weight, bias)
    wanted = [t is not None and t.requires_grad for t in given]
    if reduction == "none" or not torch.is_grad_enabled():
        wanted = [False] * 3
    numbers = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
    scale = reduction_scale(targets, ignore_index, reduction)
    found = run(
        NAME, flat, weight.contiguous(), compact(bias), targets, scale, *numbers, chunk or 0, wanted
    )
    result: torch.Tensor = found[1].view(shape) if reduction == "none" else found[0]
    return result


def chunk_of(tokens: int, chunk: int) -> int:
    """Tokens to work on at a time: `chunk`, or if that is 0 a quarter of them, 64 to 1024."""
    return chunk or min(max(-(-tokens // 4), 64), 1024)


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    chunk: int,
    gradients: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Total and losses as of `cross_entropy`, and the total's gradients of hidden, weight, bias.

    hidden: `[n, d]`; weight: `[classes, d]`; bias: `[classes]` or None; targets: `[n]`; scale:
    `[1]` or `[n]`. chunk: how many tokens at a time; of no effect on what is computed. gradients:
    which of the three are wanted; those that are not are empty, `[0]`. Matrix products, so also the
    logits and their gradient, are in hidden's dtype, as those of a linear layer; the rest is fp32.
    """
    _check(hidden, weight, bias, targets, scale, label_smoothing, z_loss, softcap, chunk, gradients)
    logits = F.linear(hidden, weight, bias)
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    total, losses, grad = loss.reference(logits, targets, scale, *numbers, any(gradients))
    found = [hidden.new_empty(0) for _ in gradients]
    if gradients[0]:
        found[0] = grad @ weight.detach()
    if gradients[1]:
        found[1] = grad.t() @ hidden.detach()
    if gradients[2]:
        found[2] = wide(grad).sum(0).to(weight.dtype)
    return total, losses, found[0], found[1], found[2]


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    chunk: int,
    gradients: list[bool],
) -> None:
    expect_float(NAME, "hidden", hidden)
    expect(hidden.dim() == 2, NAME, "hidden", f"shape {list(hidden.shape)}", "[tokens, d]")
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[1]
    shape = f"[classes, {hidden.shape[1]}]"
    expect(fits, NAME, "weight", f"shape {list(weight.shape)}", shape)
    expect(weight.dtype == hidden.dtype, NAME, "weight", weight.dtype, hidden.dtype)
    expect_together(NAME, hidden, weight=weight, bias=bias)
    if bias is not None:
        expect_shape(NAME, "bias", bias, weight.shape[:1])
        expect(bias.dtype == hidden.dtype, NAME, "bias", bias.dtype, hidden.dtype)
    rows = hidden.shape[0]
    check_loss(NAME, hidden, rows, targets, scale, label_smoothing, z_loss, softcap)
    expect(chunk >= 0, NAME, "chunk", chunk, "0 (chosen) or more")
    expect(len(gradients) == 3, NAME, "gradients", gradients, "three of True and False")
    no_bias = gradients[2] and bias is None
    expect(not no_bias, NAME, "gradients", "True for a bias that is None", "False")


def fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    chunk: int,
    gradients: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(hidden, weight, bias, targets, scale, label_smoothing, z_loss, softcap, chunk, gradients)
    dtype = wide_dtype(hidden.dtype)
    total, losses = hidden.new_empty((), dtype=dtype), hidden.new_empty(len(hidden), dtype=dtype)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    found = [
        hidden.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, gradients, strict=True)
    ]
    return total, losses, found[0], found[1], found[2]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, targets, scale, *ctx.numbers, ctx.wanted = inputs
    _, losses, *gradients = output
    ctx.set_materialize_grads(False)
    if any(ctx.wanted):
        ctx.mark_non_differentiable(losses, *gradients)
        ctx.save_for_backward(*gradients)
    else:
        ctx.mark_non_differentiable(*gradients)
        ctx.save_for_backward(hidden, weight, bias, targets, scale)


def _backward(
    call: Callable[..., Any],
    ctx: Any,
    grad_total: torch.Tensor | None,
    grad_losses: torch.Tensor | None,
    *_: Any,
) -> Any:
    found: list[torch.Tensor | None] = [None] * 3
    if any(ctx.wanted):
        if grad_total is not None:
            saved = zip(ctx.saved_tensors, ctx.wanted, strict=True)
            found = scaled(ctx, [t if wanted else None for t, wanted in saved], grad_total)
    else:
        hidden, weight, bias, targets, scale = ctx.saved_tensors
        rows = row_factors(grad_total, grad_losses, scale)
        wanted = list(ctx.needs_input_grad[:3])
        if rows is not None and any(wanted):
            given = (hidden, weight, bias, targets, rows, *ctx.numbers)
            made = call(NAME, *given, wanted)[2:]
            found = [t if w else None for t, w in zip(made, wanted, strict=True)]
    return *found, *[None] * 8


#: tokens, d, classes, bias, ignore_index, label_smoothing, z_loss, softcap, chunk
_SHAPES = (
    (6, 16, 40, True, -100, 0.0, 0.0, 0.0, 0),
    (7, 9, 131, False, 2, 0.1, 1e-3, 0.0, 3),
    (5, 8, 33, True, 0, 0.0, 0.0, 2.0, 2),
    (0, 4, 8, True, -100, 0.0, 0.0, 0.0, 0),
)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """With and without a bias and gradients; chunks that do not divide; ignored; empty."""
    found: list[tuple[Any, ...]] = []
    for tokens, d, classes, biased, ignore_index, *numbers, chunk in _SHAPES:
        hidden, weight = randn(device, dtype, tokens, d), randn(device, dtype, classes, d)
        bias = randn(device, dtype, classes) if biased else None
        targets = (torch.arange(tokens, device=device) * 5 + 3) % classes
        if tokens:
            targets[1] = ignore_index
        scale = torch.full((1,), 0.5, device=device)
        for wanted in ([False] * 3, [True, True, biased]):
            given = (hidden, weight, bias, targets, scale, ignore_index)
            found.append((*given, *numbers, chunk, wanted))
    return found


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    h = torch.ones(3, 4, device=device)
    w = torch.ones(8, 4, device=device)
    t = torch.zeros(3, dtype=torch.int64, device=device)
    one = torch.ones(1, device=device)
    rest = (-100, 0.0, 0.0, 0.0, 0, [True, True, False])
    found = [
        ("hidden: got torch.int64", (h.long(), w, None, t, one, *rest)),
        (r"weight: got shape \[8, 3\]", (h, w[:, :3], None, t, one, *rest)),
        ("weight: got torch.float16, expected torch.float32", (h, w.half(), None, t, one, *rest)),
        (r"bias: got shape \[4\], expected \[8\]", (h, w, w[0], t, one, *rest)),
        (r"targets: got shape \[2\]", (h, w, None, t[:2], one, *rest)),
        ("chunk: got -1", (h, w, None, t, one, -100, 0.0, 0.0, 0.0, -1, [True, True, False])),
        ("gradients: ", (h, w, None, t, one, -100, 0.0, 0.0, 0.0, 0, [True] * 3)),
    ]
    if device.type == "cpu":
        found.append(("targets: got 9 at index 0", (h, w, None, t + 9, one, *rest)))
    return found


def floor(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> Floor:
    products = 1 + rest[-1][0] + rest[-1][1]
    flops = 2 * products * hidden.numel() * weight.shape[0]
    read = hidden.nbytes + weight.nbytes
    return Floor(read, rest[-1][0] * hidden.nbytes + rest[-1][1] * weight.nbytes, flops)


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = randn(device, dtype, 2048, 1024), randn(device, dtype, 32000, 1024)
        targets = torch.arange(2048, device=device)
        scale = torch.full((1,), 1 / 2048, device=device)
        rest = (-100, 0.0, 0.0, 0.0, 0, [True, True, False])
        label = f"2048 tokens d1024 32000 {str(dtype)[6:]} with gradients"
        found.append((label, (hidden, weight * 0.03, None, targets, scale, *rest)))
    return found


OPS = (
    Op(
        name=NAME,
        schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor scale, "
        "int ignore_index, float label_smoothing, float z_loss, float softcap, int chunk, "
        "bool[] gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
)
