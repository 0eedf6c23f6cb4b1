"""Moving tokens to their experts and back. Source: Gale et al. 2022 (MegaBlocks), section 5.

`moe_permute` lays the rows of each expert one behind the other, so that experts are one grouped
matrix product; `moe_unpermute` adds the results of each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_together,
    randn,
    unaligned,
    wide,
    wide_dtype,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS, EXACT
from ds_core.seams.op import Autograd, Floor, Op

PERMUTE, UNPERMUTE = "moe_permute", "moe_unpermute"


class Permuted(NamedTuple):
    """Tokens in the order of their experts.

    Attributes:
        rows: `[tokens * k, width]`: those of expert e are `rows[offsets[e] : offsets[e + 1]]`, in
            the order of their tokens; behind the last expert's, zeros.
        offsets: `[experts + 1]`, int32.
        row_map: `[tokens, k]`, int32: the row of each token's slot, or -1 if it has none.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    row_map: torch.Tensor


def moe_permute(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int, *, capacity: int | None = None
) -> Permuted:
    """Copy each token once for each of its experts, sorted by expert.

    Args:
        x: `[tokens, width]`; fp32, bf16 or fp16.
        indices: `[tokens, k]`, int32: experts of each token; -1 for none. On a GPU, where a look at
            their values would wait for it, one that is out of range counts as -1.
        num_experts: how many there are.
        capacity: each expert takes at most so many tokens: all first choices come before all second
            ones, and lower tokens first (GShard); the others are dropped. None: drop nothing.

    Returns a `Permuted`, whose rows are differentiable in x.
    Raises OpError or RuntimeError for arguments that do not fit.
    """
    return Permuted(*run(PERMUTE, x, indices, num_experts, capacity))


def moe_unpermute(
    y: torch.Tensor, row_map: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum over a token's slots of `weights[token, slot] * y[row_map[token, slot]]`.

    Args:
        y: `[rows, width]`; fp32, bf16 or fp16; added in fp32.
        row_map: `[tokens, k]`, int32, as `moe_permute` returns it; -1 adds nothing, nor does, on a
            GPU, what is out of range.
        weights: `[tokens, k]`, fp32; None: all 1.

    Returns `[tokens, width]`, y's dtype, differentiable in y and weights.
    Raises OpError or RuntimeError for arguments that do not fit.
    """
    result: torch.Tensor = run(UNPERMUTE, y, row_map, weights)
    return result


# --- Permute --------------------------------------------------------------------------------------


def permute_reference(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `moe_permute`: a stable sort of the slots by their expert."""
    _check_permute(x, indices, num_experts, capacity)
    check_indices(indices, num_experts)
    tokens, k = indices.shape
    kept = indices >= 0
    if capacity is not None:
        by_slot = indices.t().reshape(-1, 1)
        chosen = by_slot == torch.arange(num_experts, device=x.device)
        rank = chosen.cumsum(0).gather(1, by_slot.clamp(min=0).long())
        kept &= (rank <= capacity).view(k, tokens).t()
    expert = indices.masked_fill(~kept, num_experts).flatten().long()
    filled = int(kept.sum())
    order = expert.argsort(stable=True)[:filled]
    row_map = torch.full_like(indices, -1)
    row_map.view(-1)[order] = torch.arange(filled, dtype=torch.int32, device=x.device)
    offsets = indices.new_zeros(num_experts + 1)
    offsets[1:] = expert.bincount(minlength=num_experts + 1)[:num_experts].cumsum(0)
    copied = x[order // k] if filled else x[:0]
    rest = x.new_zeros(indices.numel() - filled, x.shape[1])
    return torch.cat([copied, rest]), offsets, row_map


def check_indices(indices: torch.Tensor, num_experts: int) -> None:
    """Raise OpError for an index that is no expert's. Waits for the device."""
    wrong = indices[(indices < -1) | (indices >= num_experts)]
    wanted = f"0 to {num_experts - 1}, or -1 for no expert"
    expect(wrong.numel() == 0, PERMUTE, "indices", wrong[:1].tolist(), wanted)


def _check_permute(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int, capacity: int | None
) -> None:
    expect_float(PERMUTE, "x", x)
    expect(x.dim() == 2, PERMUTE, "x", f"shape {list(x.shape)}", "[tokens, width]")
    expect(indices.dtype is torch.int32, PERMUTE, "indices", indices.dtype, torch.int32)
    fits = indices.dim() == 2 and indices.shape[0] == x.shape[0]
    wanted = f"[{x.shape[0]}, k]"
    expect(fits, PERMUTE, "indices", f"shape {list(indices.shape)}", wanted)
    expect(num_experts >= 1, PERMUTE, "num_experts", num_experts, "1 or more")
    expect(capacity is None or capacity >= 0, PERMUTE, "capacity", capacity, "0 or more")
    expect_together(PERMUTE, x, indices=indices)


def permute_fake(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_permute(x, indices, num_experts, capacity)
    rows = x.new_empty((indices.shape[0] * indices.shape[1], x.shape[1]))
    return rows, indices.new_empty((num_experts + 1,)), torch.empty_like(indices)


def _setup_permute(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, offsets, row_map = output
    ctx.mark_non_differentiable(offsets, row_map)
    ctx.save_for_backward(row_map)


def _permute_backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
    (row_map,) = ctx.saved_tensors
    return call(UNPERMUTE, grad.contiguous(), row_map, None), None, None, None


# --- Unpermute ------------------------------------------------------------------------------------


def unpermute_reference(
    y: torch.Tensor, row_map: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """As `moe_unpermute`, in fp32 (float64 for float64)."""
    _check_unpermute(y, row_map, weights)
    check_rows(row_map, y.shape[0])
    found = torch.cat([wide(y), wide(y).new_zeros(1, y.shape[1])])[row_map.long()]
    if weights is not None:
        found = found * weights.masked_fill(row_map < 0, 0.0)[..., None]
    return found.sum(1).to(y.dtype)


def unpermute_backward_reference(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    row_map: torch.Tensor,
    weights: torch.Tensor | None,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of y and weights: `dy[row] = weight * grad[token]`, `dweight = grad . y[row]`.

    y may be None without weights, whose gradient is then empty. No row is named twice.
    """
    check_rows(row_map, rows)
    there = row_map >= 0
    slots = row_map.long().masked_fill(~there, rows)
    each = wide(grad)[:, None].expand(-1, row_map.shape[1], -1)
    dweights = wide(grad).new_empty((0, row_map.shape[1]))
    if weights is not None and y is not None:
        padded = torch.cat([wide(y), wide(y).new_zeros(1, grad.shape[1])])
        dweights = (each * padded[slots]).sum(-1)
        each = each * weights[..., None]
    dy = wide(grad).new_zeros((rows + 1, grad.shape[1]))
    dy[slots] = each
    return dy[:rows].to(grad.dtype), dweights


def _check_unpermute(y: torch.Tensor, row_map: torch.Tensor, weights: torch.Tensor | None) -> None:
    expect_float(UNPERMUTE, "y", y)
    expect(y.dim() == 2, UNPERMUTE, "y", f"shape {list(y.shape)}", "[rows, width]")
    expect(row_map.dtype is torch.int32, UNPERMUTE, "row_map", row_map.dtype, torch.int32)
    expect(row_map.dim() == 2, UNPERMUTE, "row_map", f"shape {list(row_map.shape)}", "[tokens, k]")
    if weights is not None:
        fits = weights.dtype == wide_dtype(y.dtype)
        expect(fits, UNPERMUTE, "weights", weights.dtype, wide_dtype(y.dtype))
        expect_shape(UNPERMUTE, "weights", weights, row_map.shape)
    expect_together(UNPERMUTE, y, row_map=row_map, weights=weights)


def check_rows(row_map: torch.Tensor, rows: int) -> None:
    """Raise OpError for a row that is not there. Waits for the device."""
    wrong = row_map[(row_map < -1) | (row_map >= rows)]
    expect(wrong.numel() == 0, UNPERMUTE, "row_map", wrong[:1].tolist(), f"-1 to {rows - 1}")


def unpermute_fake(
    y: torch.Tensor, row_map: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    _check_unpermute(y, row_map, weights)
    return y.new_empty((row_map.shape[0], y.shape[1]))


def unpermute_backward_fake(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    row_map: torch.Tensor,
    weights: torch.Tensor | None,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, k = row_map.shape
    dtype = wide_dtype(grad.dtype)
    dweights = grad.new_empty((0 if weights is None else tokens, k), dtype=dtype)
    return grad.new_empty((rows, grad.shape[1])), dweights


def _setup_unpermute(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y, row_map, weights = inputs
    ctx.rows = y.shape[0]
    # Without weights the gradient does not depend on y: it need not be kept.
    ctx.save_for_backward(None if weights is None else y, row_map, weights)


def _unpermute_backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> Any:
    y, row_map, weights = ctx.saved_tensors
    dy, dweights = call("moe_unpermute_backward", grad.contiguous(), y, row_map, weights, ctx.rows)
    return dy, None, None if weights is None else dweights


# --- Tests and measures ---------------------------------------------------------------------------


def _indices(device: torch.device, tokens: int, k: int, experts: int) -> torch.Tensor:
    """Different experts for each token, more for low ones, and none for the second expert."""
    generator = torch.Generator().manual_seed(tokens + k)
    scores = torch.rand(tokens, experts, generator=generator) / torch.arange(1, experts + 1)
    if experts > k:
        scores[:, 1] = -1
    return scores.argsort(1, descending=True)[:, :k].int().to(device)


_SIZES = (
    (33, 2, 8, 64),
    (7, 3, 5, 127),
    (2, 1, 3, 1003),
    (1, 1, 1, 1),
    (0, 2, 4, 16),
    (5, 4, 4, 8),
)


def permute_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Odd, single and empty sizes; k of one and all; slots without experts; capacities."""
    found: list[tuple[Any, ...]] = []
    for tokens, k, experts, width in _SIZES:
        x = randn(device, dtype, tokens, width)
        found.append((x, _indices(device, tokens, k, experts), experts, None))
    x, indices, experts, _ = found[0]
    some = indices.clone()
    some[::3, 1] = -1
    return [
        *found,
        (unaligned(x), indices, experts, None),
        (x, some, experts, None),
        (x, indices, experts, 5),
        (x, some, experts, 1),
        (x, indices, experts, 0),
    ]


def unpermute_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for index, args in enumerate(permute_cases(device, dtype)):
        rows, _, row_map = permute_reference(*args)
        weights = randn(device, torch.float32, *row_map.shape)
        found.append((rows, row_map, weights if index % 3 else None))
    return found


def unpermute_backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for y, row_map, weights in unpermute_cases(device, dtype):
        grad = randn(device, dtype, row_map.shape[0], y.shape[1], seed=1)
        kept = None if weights is None else y
        found.append((grad, kept, row_map, weights, y.shape[0]))
    return found


def permute_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = randn(device, torch.float32, 4, 8)
    indices = _indices(device, 4, 2, 3)
    found: list[tuple[str, tuple[Any, ...]]] = [
        ("x: got torch.int64", (x.long(), indices, 3, None)),
        ("x: got shape", (x[0], indices, 3, None)),
        ("indices: got torch.int64", (x, indices.long(), 3, None)),
        ("indices: got shape", (x, indices[:3], 3, None)),
        ("num_experts: got 0", (x, indices, 0, None)),
        ("capacity: got -1", (x, indices, 3, -1)),
    ]
    if device.type == "cpu":  # on a GPU nothing waits for their values
        found += [
            ("indices: got .*2.*expected 0 to 1", (x, indices, 2, None)),
            ("indices: got .*-2.*expected 0 to 2", (x, indices * 0 - 2, 3, None)),
        ]
    return found


def unpermute_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    y = randn(device, torch.float32, 6, 8)
    row_map = torch.arange(6, dtype=torch.int32, device=device).view(3, 2)
    weights = torch.ones(3, 2, device=device)
    found: list[tuple[str, tuple[Any, ...]]] = [
        ("y: got torch.int64", (y.long(), row_map, weights)),
        ("y: got shape", (y[0], row_map, weights)),
        ("row_map: got torch.int64", (y, row_map.long(), weights)),
        ("row_map: got shape", (y, row_map[0], weights)),
        ("weights: got torch.float16", (y, row_map, weights.half())),
        (r"weights: got shape \[2, 2\]", (y, row_map, weights[:2])),
    ]
    if device.type == "cpu":  # on a GPU nothing waits for their values
        found += [
            ("row_map: got .*6.*expected -1 to 5", (y, row_map + 1, weights)),
            ("row_map: got .*-2.*expected -1 to 5", (y, row_map - 2, weights)),
        ]
    return found


def permute_floor(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int, capacity: int | None
) -> Floor:
    k = indices.shape[1]
    return Floor(x.nbytes + indices.nbytes, k * x.nbytes + indices.nbytes + 4 * num_experts)


def unpermute_floor(y: torch.Tensor, row_map: torch.Tensor, weights: torch.Tensor | None) -> Floor:
    read = y.nbytes + row_map.nbytes + (0 if weights is None else weights.nbytes)
    written = row_map.shape[0] * y.shape[1] * y.element_size()
    return Floor(read, written, 2 * y.numel())


def unpermute_backward_floor(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    row_map: torch.Tensor,
    weights: torch.Tensor | None,
    rows: int,
) -> Floor:
    read = sum(t.nbytes for t in (grad, y, row_map, weights) if t is not None)
    dy = rows * grad.shape[1] * grad.element_size()
    return Floor(read, dy + row_map.nbytes, 3 * rows * grad.shape[1])


def permute_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """2048 tokens of Mixtral and of Qwen3-MoE."""
    rows = []
    for k, experts, width in ((2, 8, 4096), (8, 128, 2048)):
        x = randn(device, torch.bfloat16, 2048, width)
        label = f"2048x{width}, {k} of {experts} bfloat16"
        rows.append((label, (x, _indices(device, 2048, k, experts), experts, None)))
    return rows


def unpermute_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for label, args in permute_benchmarks(device):
        rows, _, row_map = permute_reference(*args)
        found.append((label, (rows, row_map, torch.rand(row_map.shape, device=device))))
    return found


def unpermute_backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for label, (y, row_map, weights) in unpermute_benchmarks(device):
        grad = randn(device, y.dtype, row_map.shape[0], y.shape[1])
        found.append((label, (grad, y, row_map, weights, y.shape[0])))
    return found


OPS = (
    Op(
        name=PERMUTE,
        schema="(Tensor x, Tensor indices, int num_experts, int? capacity) "
        "-> (Tensor, Tensor, Tensor)",
        reference=permute_reference,
        fake=permute_fake,
        dtypes=FLOATS,
        tolerance=EXACT,
        cases=permute_cases,
        refused=permute_refused,
        floor=permute_floor,
        benchmarks=permute_benchmarks,
        autograd=Autograd(_setup_permute, _permute_backward),
    ),
    Op(
        name=UNPERMUTE,
        schema="(Tensor y, Tensor row_map, Tensor? weights) -> Tensor",
        reference=unpermute_reference,
        fake=unpermute_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=unpermute_cases,
        refused=unpermute_refused,
        floor=unpermute_floor,
        benchmarks=unpermute_benchmarks,
        autograd=Autograd(_setup_unpermute, _unpermute_backward),
    ),
    Op(
        name="moe_unpermute_backward",
        schema="(Tensor grad, Tensor? y, Tensor row_map, Tensor? weights, int rows) "
        "-> (Tensor, Tensor)",
        reference=unpermute_backward_reference,
        fake=unpermute_backward_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=unpermute_backward_cases,
        refused=lambda device: [],
        floor=unpermute_backward_floor,
        benchmarks=unpermute_backward_benchmarks,
    ),
)
