"""Routing of tokens to experts: probabilities, the k best of them, counts; forward and backward.

A program has whole rows of a few tokens in registers: logits are read once and probabilities
written once, nearly all that there is to move; the k best are found by k reductions over registers.
Counts are added with integer atomics, whose order cannot show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import moe_gate as op
from ds_core.ops.arguments import expect, expect_shape, expect_together
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch

#: The order of what was taken already, or is no expert: below that of -inf.
_TAKEN = tl.constexpr(-0x80000000)
_TINY = tl.constexpr(op.TINY)


@triton.jit
def _ordered(score):
    """Integers with the order of fp32 numbers; NaN is -inf, and -0 is 0."""
    score = tl.where(score != score, float("-inf"), score)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _lowest_best(order, column, COLUMNS: tl.constexpr):
    """Of each row, where its largest number is, and first is."""
    best = tl.max(order, axis=1)
    return tl.min(tl.where(order == best[:, None], column[None, :], COLUMNS), axis=1)


@triton.jit
def _best_two(by_group, size):
    """The sum of the two largest numbers of each group; of the only one, itself."""
    first = tl.max(by_group, axis=2)
    member = tl.arange(0, by_group.shape[2])[None, None, :]
    at = tl.min(tl.where(by_group == first[:, :, None], member, by_group.shape[2]), axis=2)
    rest = tl.where(member == at[:, :, None], float("-inf"), by_group)
    return tl.where(size > 1, first + tl.max(rest, axis=2), first)


@triton.jit(do_not_specialize=["tokens", "k", "groups", "top_groups", "factor"])
def gate_forward(
    logits,
    bias,
    weights,
    indices,
    counts,
    probabilities,
    tokens,
    experts,
    k,
    groups,
    top_groups,
    factor,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The routing of ROWS tokens; counts are added to.

    Columns are those of GROUPS groups of equal room, of which the first `groups` are there.
    """
    SIZE: tl.constexpr = BLOCK // GROUPS
    size = experts // groups
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    expert = column // SIZE * size + column % SIZE
    inside = (column % SIZE < size) & (column // SIZE < groups)
    there = row < tokens
    mask = there[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * experts + expert[None, :]
    z = tl.load(logits + at, mask=mask, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        p = tl.exp(z - tl.max(z, axis=1)[:, None])
        p = tl.where(inside[None, :], p, 0.0)
        p = p / tl.sum(p, axis=1)[:, None]
    else:
        p = 1.0 / (1.0 + tl.exp(-z))
    tl.store(probabilities + at, p, mask=mask)
    # Where probabilities have the order of logits, these decide: rounding makes no ties of them.
    score = z
    if BIASED or GROUPS > 1:
        score = p
    if BIASED:
        score += tl.load(bias + expert, mask=inside, other=0.0)[None, :]
    order = tl.where(inside[None, :], _ordered(score), _TAKEN)
    if GROUPS > 1:
        score = tl.where((score == score) & inside[None, :], score, float("-inf"))
        best_two = _best_two(tl.reshape(score, (ROWS, GROUPS, SIZE)), size)
        group = tl.arange(0, GROUPS)
        left = tl.where((group < groups)[None, :], _ordered(best_two), _TAKEN)
        kept = tl.zeros((ROWS, GROUPS), tl.int32)
        for _ in range(top_groups):
            found = group[None, :] == _lowest_best(left, group, GROUPS)[:, None]
            kept = tl.where(found, 1, kept)
            left = tl.where(found, _TAKEN, left)
        kept = tl.broadcast_to(kept[:, :, None], (ROWS, GROUPS, SIZE))
        order = tl.where(tl.reshape(kept, (ROWS, BLOCK)) > 0, order, _TAKEN)
    slot = tl.full((ROWS, BLOCK), -1, tl.int32)
    for i in range(k):
        found = column[None, :] == _lowest_best(order, column, BLOCK)[:, None]
        slot = tl.where(found, i, slot)
        order = tl.where(found, _TAKEN, order)
    chosen = slot >= 0
    weight = p
    if NORMALIZE:
        weight = p / (tl.sum(tl.where(chosen, p, 0.0), axis=1) + _TINY)[:, None]
    place = row.to(tl.int64)[:, None] * k + slot
    chosen = chosen & mask
    tl.store(weights + place, weight * factor, mask=chosen)
    tl.store(indices + place, tl.broadcast_to(expert[None, :], (ROWS, BLOCK)), mask=chosen)
    own = tl.sum(chosen.to(tl.int32), axis=0)
    tl.atomic_add(counts + expert, own, mask=inside & (own > 0), sem="relaxed")


@triton.jit(do_not_specialize=["tokens", "k", "factor"])
def gate_backward(
    grad_weights,
    grad_probabilities,
    probabilities,
    indices,
    dlogits,
    tokens,
    experts,
    k,
    factor,
    OF_WEIGHTS: tl.constexpr,
    OF_PROBABILITIES: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the logits of ROWS tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = row < tokens
    mask = there[:, None] & (column < experts)[None, :]
    begin = row.to(tl.int64)
    at = begin[:, None] * experts + column[None, :]
    p = tl.load(probabilities + at, mask=mask, other=0.0)
    grad = tl.zeros((ROWS, BLOCK), tl.float32)
    if OF_PROBABILITIES:
        grad += tl.load(grad_probabilities + at, mask=mask, other=0.0)
    if OF_WEIGHTS:
        total = tl.zeros((ROWS,), tl.float32)
        inner = tl.zeros((ROWS,), tl.float32)
        if NORMALIZE:
            for i in range(k):
                expert = tl.load(indices + begin * k + i, mask=there, other=0)
                own = tl.load(grad_weights + begin * k + i, mask=there, other=0.0) * factor
                chosen = tl.sum(tl.where(column[None, :] == expert[:, None], p, 0.0), axis=1)
                total += chosen
                inner += own * chosen
            total += _TINY
            inner = inner / total
        for i in range(k):
            expert = tl.load(indices + begin * k + i, mask=there, other=0)
            own = tl.load(grad_weights + begin * k + i, mask=there, other=0.0) * factor
            if NORMALIZE:
                own = (own - inner) / total
            grad += tl.where(column[None, :] == expert[:, None], own[:, None], 0.0)
    if SOFTMAX:
        out = p * (grad - tl.sum(grad * p, axis=1)[:, None])
    else:
        out = p * (1.0 - p) * grad
    tl.store(dlogits + at, out.to(dlogits.dtype.element_ty), mask=mask)


_CONFIGS = (
    Config({"ROWS": 32, "BLOCK": 32}, {"experts": 32}, warps=4),
    Config({"ROWS": 8, "BLOCK": 256}, {"experts": 256}, warps=4),
    Config({"ROWS": 1, "BLOCK": 2048}, {"experts": 2048}, warps=4),
)
_FORWARD = Kernel(
    gate_forward,
    _CONFIGS,
    types(
        {
            "*bf16": "logits",
            "*fp32": "bias weights probabilities",
            "*i32": "indices counts",
            "i32": "tokens k groups top_groups",
            "i32:16": "experts",
            "fp32": "factor",
        },
        SOFTMAX=False,
        NORMALIZE=True,
        BIASED=True,
        GROUPS=8,
    ),
)
_BACKWARD = Kernel(
    gate_backward,
    _CONFIGS,
    types(
        {
            "*bf16": "dlogits",
            "*fp32": "grad_weights grad_probabilities probabilities",
            "*i32": "indices",
            "i32": "tokens k",
            "i32:16": "experts",
            "fp32": "factor",
        },
        OF_WEIGHTS=True,
        OF_PROBABILITIES=True,
        SOFTMAX=True,
        NORMALIZE=True,
    ),
)
KERNELS = (_FORWARD, _BACKWARD)


def moe_gate(
    logits: torch.Tensor,
    k: int,
    normalize: bool,
    scoring: str,
    bias: torch.Tensor | None,
    groups: int,
    top_groups: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.moe_gate.reference`."""
    results = op.fake(logits, k, normalize, scoring, bias, groups, top_groups, scale)
    weights, indices, counts, probabilities = results
    expect_plain(op.NAME, logits=logits, bias=bias)
    tokens, experts = logits.shape
    room = triton.next_power_of_2(groups)
    padded = room * triton.next_power_of_2(experts // groups)  # groups of equal room
    config = _FORWARD.config(op.NAME, logits.device, experts=padded)
    counts.zero_()
    launch(
        *(_FORWARD, config, (blocks(tokens, config.constants["ROWS"]),)),
        *(logits, probabilities if bias is None else bias, weights, indices, counts),
        *(probabilities, tokens, experts, k, groups, top_groups, scale),
        SOFTMAX=scoring == "softmax",
        NORMALIZE=normalize,
        BIASED=bias is not None,
        GROUPS=room,
    )
    return weights, indices, counts, probabilities


def moe_gate_backward(
    grad_weights: torch.Tensor | None,
    grad_probabilities: torch.Tensor | None,
    logits: torch.Tensor,
    probabilities: torch.Tensor,
    indices: torch.Tensor,
    normalize: bool,
    scoring: str,
    scale: float,
) -> torch.Tensor:
    """As `ds_core.ops.moe_gate.backward_reference`."""
    _check_backward(grad_weights, grad_probabilities, logits, probabilities, indices)
    tokens, experts = logits.shape
    config = _BACKWARD.config(op.NAME, logits.device, experts=experts)
    dlogits = torch.empty_like(logits)
    launch(
        *(_BACKWARD, config, (blocks(tokens, config.constants["ROWS"]),)),
        *(probabilities if grad_weights is None else grad_weights,),
        *(probabilities if grad_probabilities is None else grad_probabilities,),
        *(probabilities, indices, dlogits, tokens, experts, indices.shape[1], scale),
        OF_WEIGHTS=grad_weights is not None,
        OF_PROBABILITIES=grad_probabilities is not None,
        SOFTMAX=scoring == "softmax",
        NORMALIZE=normalize,
    )
    return dlogits


def _check_backward(
    grad_weights: torch.Tensor | None,
    grad_probabilities: torch.Tensor | None,
    logits: torch.Tensor,
    probabilities: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    expect(indices.dtype == torch.int32, op.NAME, "indices", indices.dtype, torch.int32)
    fits = indices.dim() == 2 and len(indices) == len(logits)
    expect(fits, op.NAME, "indices", f"shape {list(indices.shape)}", f"[{len(logits)}, k]")
    floats = {"probabilities": (probabilities, logits), "grad_weights": (grad_weights, indices)}
    floats["grad_probabilities"] = (grad_probabilities, logits)
    for name, (t, like) in floats.items():
        if t is not None:
            expect_shape(op.NAME, name, t, like.shape)
            expect(t.dtype == torch.float32, op.NAME, name, t.dtype, torch.float32)
    plain = {name: t for name, (t, _) in floats.items()}
    expect_plain(op.NAME, logits=logits, indices=indices, **plain)
    expect_together(op.NAME, logits, indices=indices, **plain)
