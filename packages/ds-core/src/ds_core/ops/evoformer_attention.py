"""Attention of AlphaFold's Evoformer, over rows or columns of an alignment or of pairs.

Source: Jumper et al. 2021, supplement, algorithms 7 and 8 (rows and columns of the alignment), 13
and 14 (triangles); Rabe and Staats 2021 and Dao 2023 (softmax in one pass, recomputed backward).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ds_core.ops.arguments import (
    FLOATS,
    compact,
    expect,
    expect_float,
    expect_like,
    expect_shape,
    expect_tensors,
    expect_together,
    randn,
    unaligned,
    wide,
    wide_dtype,
)
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Autograd, Floor, Op

NAME = "evoformer_attention"
BACKWARD = "evoformer_attention_backward"


def evoformer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """`softmax(scale * q k^T + bias1 + bias2) v` over the residues of each sequence and head.

    Args:
        q, k, v: `[batch, N_seq, N_res, heads, d]`, fp32, bf16 or fp16; any sizes. Computed in fp32.
        bias1: `[batch, N_seq, 1, 1, N_res]`, q's dtype: of each key of a sequence, such as a mask
            of -1e9 or -inf; None: none.
        bias2: `[batch, 1, heads, N_res, N_res]`, q's dtype: of each pair of residues (query, key),
            alike for all sequences; None: none.
        scale: of the products; None: `1 / sqrt(d)`.

    Returns `[batch, N_seq, N_res, heads, d]`, q's dtype; a query all of whose keys are at -inf gets
    zeros. Differentiable in q, k, v and both biases: the gradient of bias1 is summed over heads and
    queries, that of bias2 over the sequences, in fp32 and in a fixed order. The scores of all
    sequences are never in memory at once; without biases it is torch's own attention.

    Raises OpError for shapes, dtypes and devices that do not fit.
    """
    expect_tensors(NAME, q=q, k=k, v=v)
    given = {"bias1": bias1, "bias2": bias2}
    expect_tensors(NAME, **{name: bias for name, bias in given.items() if bias is not None})
    expect(q.dim() >= 1, NAME, "q", "a scalar", "[batch, N_seq, N_res, heads, d]")
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    expect(-math.inf < scale < math.inf, NAME, "scale", scale, "a finite number")
    if bias1 is None and bias2 is None:
        _check(q, k, v, None, None)
        # With a fifth dimension torch would have all scores in memory.
        queries, keys, values = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        return mixed.transpose(1, 2).contiguous().view(q.shape)
    tensors = (t.contiguous() for t in (q, k, v))
    out: torch.Tensor = run(NAME, *tensors, compact(bias1), compact(bias2), scale)[0]
    return out


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `evoformer_attention`; and the logarithm of each softmax's sum of exponentials,
    `[batch, N_seq, heads, N_res]`, fp32: -inf for a query all of whose keys are at -inf."""
    _check(q, k, v, bias1, bias2)
    scores = _scores(q, k, bias1, bias2, scale)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    out = torch.einsum("bshij,bsjhd->bsihd", weights, wide(v))
    return out.to(q.dtype).contiguous(), scores.logsumexp(-1)


def backward_reference(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    wants: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, bias1 and bias2, from the results of the forward: with P the weights,

    `dV = P^T grad`, `dS = P * (grad V^T - rowsum(grad * out))`, `dQ = scale dS K`,
    `dK = scale dS^T Q`, `dbias1 = sum of dS over heads and queries` and `dbias2 = sum of dS over
    sequences`. Those of the biases are empty, `[0]`, where `wants` (of bias1, of bias2) says so or
    there is no such bias.
    """
    _check_backward(grad, q, k, v, bias1, bias2, out, lse)
    finite = lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)
    weights = torch.exp(_scores(q, k, bias1, bias2, scale) - finite)
    g = wide(grad)
    dv = torch.einsum("bshij,bsihd->bsjhd", weights, g)
    level = (g * wide(out)).sum(-1).transpose(2, 3).unsqueeze(-1)
    ds = weights * (torch.einsum("bsihd,bsjhd->bshij", g, wide(v)) - level)
    dq = torch.einsum("bshij,bsjhd->bsihd", ds, wide(k)) * scale
    dk = torch.einsum("bshij,bsihd->bsjhd", ds, wide(q)) * scale
    dq, dk, dv = (t.to(q.dtype).contiguous() for t in (dq, dk, dv))
    dbias1, dbias2 = empty_gradients(q, bias1, bias2, wants)
    if dbias1.dim() > 1:
        dbias1 = ds.sum((2, 3))[:, :, None, None].to(q.dtype)
    if dbias2.dim() > 1:
        dbias2 = ds.sum(1, keepdim=True).to(q.dtype)
    return dq, dk, dv, dbias1, dbias2


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """`[batch, N_seq, heads, query, key]`."""
    scores = torch.einsum("bsihd,bsjhd->bshij", wide(q), wide(k)) * scale
    for bias in (bias1, bias2):
        if bias is not None:
            scores = scores + wide(bias)
    return scores


def empty_gradients(
    q: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    wants: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the gradients of the biases, of shape `[0]` for one that is not wanted."""
    first, second = (
        q.new_empty(0) if bias is None or not wanted else torch.empty_like(bias)
        for bias, wanted in zip((bias1, bias2), wants, strict=True)
    )
    return first, second


# --- Checks ---------------------------------------------------------------------------------------


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
) -> None:
    expect_float(NAME, "q", q)
    told = "[batch, N_seq, N_res, heads, d]"
    expect(q.dim() == 5 and q.shape[4] > 0, NAME, "q", f"shape {list(q.shape)}", told)
    expect_like(NAME, "k", k, q)
    expect_like(NAME, "v", v, q)
    batch, sequences, residues, heads, _ = q.shape
    for name, bias, shape in (
        ("bias1", bias1, (batch, sequences, 1, 1, residues)),
        ("bias2", bias2, (batch, 1, heads, residues, residues)),
    ):
        if bias is not None:
            expect_shape(NAME, name, bias, shape)
            expect(bias.dtype == q.dtype, NAME, name, bias.dtype, q.dtype)
    expect_together(NAME, q, k=k, v=v, bias1=bias1, bias2=bias2)


def _check_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    _check(q, k, v, bias1, bias2)
    expect_like(BACKWARD, "grad", grad, q)
    expect_like(BACKWARD, "out", out, q)
    batch, sequences, residues, heads, _ = q.shape
    expect_shape(BACKWARD, "lse", lse, (batch, sequences, heads, residues))
    expect(lse.dtype == wide_dtype(q.dtype), BACKWARD, "lse", lse.dtype, wide_dtype(q.dtype))
    expect_together(BACKWARD, q, grad=grad, out=out, lse=lse)


def fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, v, bias1, bias2)
    batch, sequences, residues, heads, _ = q.shape
    lse = q.new_empty((batch, sequences, heads, residues), dtype=wide_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def backward_fake(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    wants: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_backward(grad, q, k, v, bias1, bias2, out, lse)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    return dq, dk, dv, *empty_gradients(q, bias1, bias2, wants)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _backward(call: Callable[..., Any], ctx: Any, grad: torch.Tensor, _lse: Any) -> Any:
    wants = [bool(needed) for needed in ctx.needs_input_grad[3:5]]
    found = call(BACKWARD, grad.contiguous(), *ctx.saved_tensors, ctx.scale, wants)
    dq, dk, dv, *biases = found
    given = (bias if bias.dim() > 1 else None for bias in biases)
    return dq, dk, dv, *given, None


# --- Cases ----------------------------------------------------------------------------------------

#: Batch, sequences, residues, heads, width; whether there is a bias1, a bias2.
_SHAPES = (
    ((1, 2, 17, 2, 16), True, True),
    ((2, 3, 5, 1, 8), True, True),
    ((1, 2, 24, 2, 24), False, True),
    ((1, 1, 70, 1, 32), True, False),
    ((0, 2, 4, 1, 8), True, True),
    ((1, 1, 33, 1, 4), False, False),
)
_ONE = ((1, 2, 1, 1, 4), True, True)


def _made(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], first: bool, second: bool
) -> tuple[Any, ...]:
    batch, sequences, residues, heads, width = shape
    q, k, v = (randn(device, dtype, *shape, seed=seed) for seed in range(3))
    bias1 = randn(device, dtype, batch, sequences, 1, 1, residues)
    bias2 = randn(device, dtype, batch, 1, heads, residues, residues)
    return q, k, v, bias1 if first else None, bias2 if second else None, 1 / math.sqrt(width)


def _masked(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Begins unaligned; some keys of the first sequence are at -inf, and all of the second."""
    q, k, v, bias1, bias2, scale = _made(device, dtype, *_SHAPES[0])
    bias1[0, 0, ..., 3:9] = -torch.inf
    bias1[0, 1] = -torch.inf
    return unaligned(q), unaligned(k), unaligned(v), bias1, unaligned(bias2), scale


def _preferred(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """One key has a bias whose exponential no dtype holds; of fp32 it would take the digits."""
    if dtype is torch.float32:
        return []
    q, k, v, bias1, bias2, scale = _made(device, dtype, *_SHAPES[0])
    bias1[..., 3] = 100.0
    return [(q, k, v, bias1, bias2, scale)]


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """With and without each bias; less than a tile, and not a multiple; empty; masked keys."""
    ordinary = [_made(device, dtype, *each) for each in (*_SHAPES, _ONE)]
    return [*ordinary, _masked(device, dtype), *_preferred(device, dtype)]


def with_gradient(
    args: tuple[Any, ...], wants: tuple[bool, bool] = (True, True)
) -> tuple[Any, ...]:
    """Arguments of the backward for those of the forward."""
    q = args[0]
    out, lse = reference(*args)
    grad = randn(q.device, q.dtype, *q.shape, seed=3)
    return grad, *args[:5], out, lse, args[5], list(wants)


def backward_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Without a single residue, whose gradients are 0 but for rounding."""
    made = [_made(device, dtype, *each) for each in _SHAPES]
    some = ((True, False), (False, True))
    return [
        *(with_gradient(a) for a in (*made, _masked(device, dtype), *_preferred(device, dtype))),
        *(with_gradient(made[0], wants) for wants in some),
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(1, 2, 3, 4, 8, device=device)
    first, second = x.new_ones(1, 2, 1, 1, 3), x.new_ones(1, 1, 4, 3, 3)
    return [
        ("q: got torch.int64", (x.long(), x.long(), x.long(), None, None, 1.0)),
        (r"q: got shape \[2, 3, 4, 8\]", (x[0], x[0], x[0], None, None, 1.0)),
        ("k: ", (x, x[:, :1].contiguous(), x, None, None, 1.0)),
        ("v: got torch.float16, expected torch.float32", (x, x, x.half(), None, None, 1.0)),
        (r"bias1: got shape \[1, 2, 1, 3\]", (x, x, x, first[:, :, 0], second, 1.0)),
        (r"bias2: got shape .*, expected \[1, 1, 4, 3, 3\]", (x, x, x, first, first, 1.0)),
        ("bias2: got torch.float16", (x, x, x, first, second.half(), 1.0)),
    ]


def backward_refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    grad, *rest = with_gradient(_made(device, torch.float32, *_SHAPES[1]))
    *tensors, lse, scale, wants = rest
    return [
        ("grad: got torch.float16, expected torch.float32", (grad.half(), *rest)),
        ("lse: got shape", (grad, *tensors, lse[:1].contiguous(), scale, wants)),
    ]


def floor(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    scale: float,
) -> Floor:
    biases = sum(bias.nbytes for bias in (bias1, bias2) if bias is not None)
    return Floor(3 * q.nbytes + biases, q.nbytes, 4 * q.numel() * q.shape[2])


def backward_floor(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    wants: list[bool],
) -> Floor:
    pairs = [(b.nbytes, w) for b, w in zip((bias1, bias2), wants, strict=True) if b is not None]
    read = 5 * q.nbytes + lse.nbytes + sum(size for size, _ in pairs)
    written = 3 * q.nbytes + sum(size for size, wanted in pairs if wanted)
    return Floor(read, written, 10 * q.numel() * q.shape[2])


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    shape = (1, 16, 256, 4, 32)
    return [
        ("16x256 4x32 " + str(dtype)[6:], _made(device, dtype, shape, True, True))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def backward_benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    return [(label, with_gradient(args)) for label, args in benchmarks(device)]


OPS = (
    Op(
        name=NAME,
        schema="(Tensor q, Tensor k, Tensor v, Tensor? bias1, Tensor? bias2, float scale) -> "
        "(Tensor, Tensor)",
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
        name=BACKWARD,
        schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias1, Tensor? bias2, "
        "Tensor out, Tensor lse, float scale, bool[] wants) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=backward_cases,
        refused=backward_refused,
        floor=backward_floor,
        benchmarks=backward_benchmarks,
    ),
)
