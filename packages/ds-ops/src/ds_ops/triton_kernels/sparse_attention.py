"""Attention over the blocks of a layout, forward and backward, for blocks of 16 tokens and more.

A program has a tile of 64 queries (or keys, for dK and dV) and walks along the list of what it sees
or is seen by (`ds_core.ops.block_layout`): units of 16 to 64 tokens, gathered into tiles, so that
products are as large as matrix instructions want them and columns of narrow blocks cost what they
are. Groups that every row sees whole come first and need no mask. Long rows begin first; the others
of one head run beside each other and share its keys in the cache. No program adds to what another
has written, so a result is the same in every run.

The floor is that of the products; a tile reads 1 byte per 64 operations from the cache, which is
half of what an H200's matrix units ask for at their peak and what a gathered tile allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ds_core.ops import sparse_attention as op
from ds_core.ops.arguments import FLOATS, expect
from ds_core.ops.block_layout import PART_BITS, TILE, unit_of
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import MATRIX

_LOG2E = tl.constexpr(1.4426950408889634)
_SHIFT = tl.constexpr(PART_BITS)
#: Heads are no wider: their sums would not fit into registers.
_MAX_HEAD = 128


@triton.jit
def _work(plan, tiles, heads, layout_heads, pairs):
    """This program's head (of all batches), its tile, where its entries are, and its groups.

    The heavy tiles of all heads come first, then the rest of one head after that of another.
    """
    program = tl.program_id(0)
    heavy = tl.load(plan)
    before = heavy * pairs
    light = tl.maximum(tiles - heavy, 1)
    later = program - before
    rank = tl.where(later < 0, program // pairs, heavy + later % light)
    pair = tl.where(later < 0, program % pairs, later // light)
    own = (pair % heads) % layout_heads * tiles
    count = layout_heads * tiles
    at = own + tl.load(plan + 1 + own + rank)
    begin = tl.load(plan + 1 + count + at)
    full = tl.load(plan + 1 + 2 * count + at)
    groups = tl.load(plan + 1 + 3 * count + at)
    return pair, at - own, plan + 1 + 4 * count + begin, full, groups


@triton.jit
def _gathered(entries, step, UNIT: tl.constexpr, STEP: tl.constexpr):
    """Of a step along a list: where its tokens are, and which parts of the tile see each."""
    place = tl.arange(0, STEP)
    if UNIT >= STEP:
        entry = tl.load(entries + step // (UNIT // STEP))
        first = (entry >> _SHIFT) * UNIT + step % (UNIT // STEP) * STEP
        return first + place, entry + place * 0
    entry = tl.load(entries + step * (STEP // UNIT) + place // UNIT)
    return (entry >> _SHIFT) * UNIT + place % UNIT, entry


@triton.jit
def _rows(base, token, stride, column, there, inside, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """Rows of a tensor, `[tokens, HEAD]`; MASKED: only those that are there, else zeros."""
    at = base + token.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED:
        return tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
    if EXACT:
        return tl.load(at)
    return tl.load(at, mask=inside[None, :], other=0.0)


@triton.jit
def _biased(
    scores,
    query,
    key,
    query_there,
    key_there,
    rpe,
    rpe_row,
    padding,
    mask,
    mask_row,
    RPE: tl.constexpr,
    PADDING: tl.constexpr,
    MASK: tl.constexpr,
):
    """Scores, in powers of 2, with bias and masks; query and key: a column and a row, or turned.

    PADDING, MASK: 0 for no such mask, 1 for one that is added, 2 for one that says what is seen.
    """
    if RPE:
        at = rpe + query.to(tl.int64) * rpe_row + key
        scores += tl.load(at, mask=query_there & key_there, other=0.0).to(tl.float32) * _LOG2E
    if PADDING > 0:
        number = tl.load(padding + key, mask=key_there, other=0.0).to(tl.float32)
        if PADDING == 2:
            number = tl.where(number == 0, float("-inf"), 0.0)
        scores += number * _LOG2E
    if MASK > 0:
        at = mask + query.to(tl.int64) * mask_row + key
        number = tl.load(at, mask=query_there & key_there, other=0.0).to(tl.float32)
        if MASK == 2:
            number = tl.where(number == 0, float("-inf"), 0.0)
        scores += number * _LOG2E
    return scores


@triton.jit
def _hidden(scores, entry, part, query, key, CAUSAL: tl.constexpr):
    """Scores with -inf where the layout, or the order of tokens, hides a key."""
    seen = ((entry >> part) & 1) != 0
    if CAUSAL:
        seen = seen & (key <= query)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _attend(
    peak, total, sums, q, k, v, entries, step, row, there, stride, column, inside, factor,
    rpe, rpe_row, padding, mask, mask_row,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, EXACT: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """A step of keys more: peak and total of the exponentials, sums of the values."""
    key, entry = _gathered(entries, step, UNIT, STEP)
    keys = _rows(k, key, stride, column, there, inside, False, EXACT)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * factor
    scores = _biased(
        scores, row[:, None], key[None, :], there[:, None], (key >= 0)[None, :],
        rpe, rpe_row, padding, mask, mask_row, RPE, PADDING, MASK,
    )  # fmt: skip
    if HIDES:
        part = (tl.arange(0, SIZE) // UNIT)[:, None]
        scores = _hidden(scores, entry[None, :], part, row[:, None], key[None, :], CAUSAL)
    higher = tl.maximum(peak, tl.max(scores, 1))
    # Of a row that sees nothing yet; -inf less itself is no number.
    level = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - level[:, None])
    shrink = tl.exp2(peak - level)
    values = _rows(v, key, stride, column, there, inside, False, EXACT)
    sums = tl.dot(weights.to(v.dtype.element_ty), values, sums * shrink[:, None],
                  input_precision="ieee")  # fmt: skip
    return higher, total * shrink + tl.sum(weights, 1), sums


#: Numbers that no address depends on: one code for all.
_PLAIN = ["layout_heads", "tiles", "programs", "heads"]


@triton.jit(do_not_specialize=_PLAIN)
def sparse_forward(
    q, k, v, out, lse, plan, rpe, padding, mask,
    tokens, width, heads, layout_heads, tiles, programs,
    stride_batch, stride_head, stride, out_batch, out_head, out_row,
    rpe_batch, rpe_head, rpe_row, padding_batch, mask_row, factor,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, HEAD: tl.constexpr, EXACT: tl.constexpr, SIZE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A tile of queries: `softmax(q k^T * scale + bias) v` and the logarithm of its sum.

    factor: scale / ln 2, for powers of 2 are what GPUs compute.
    """
    pair, tile, entries, full, groups = _work(plan, tiles, heads, layout_heads, programs // tiles)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = batch * stride_batch + head * stride_head
    rpe += batch * rpe_batch + head * rpe_head
    padding += batch * padding_batch
    row = tile * SIZE + tl.arange(0, SIZE)
    there = row < tokens
    column = tl.arange(0, HEAD)
    inside = column < width
    own = _rows(q + first, row, stride, column, there, inside, True, EXACT)
    peak = tl.full((SIZE,), float("-inf"), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    sums = tl.zeros((SIZE, HEAD), tl.float32)
    for step in range(full * (SIZE // STEP)):
        peak, total, sums = _attend(
            peak, total, sums, own, k + first, v + first, entries, step, row, there, stride,
            column, inside, factor, rpe, rpe_row, padding, mask, mask_row,
            RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, False,
        )  # fmt: skip
    if UNIT < SIZE or CAUSAL:
        for step in range(full * (SIZE // STEP), groups * (SIZE // STEP)):
            peak, total, sums = _attend(
                peak, total, sums, own, k + first, v + first, entries, step, row, there, stride,
                column, inside, factor, rpe, rpe_row, padding, mask, mask_row,
                RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, True,
            )  # fmt: skip
    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    at = out + batch * out_batch + head * out_head + row.to(tl.int64)[:, None] * out_row
    tl.store(at + column[None, :], result.to(out.dtype.element_ty),
             mask=there[:, None] & inside[None, :])  # fmt: skip
    told = tl.where(total == 0, float("-inf"), (peak + tl.log2(total)) / _LOG2E)
    tl.store(lse + pair.to(tl.int64) * tokens + row, told, mask=there)


@triton.jit
def _query_gradient(
    sums, q, grad, level, delta, k, v, entries, step, row, there, stride, column, inside, factor,
    rpe, rpe_row, padding, mask, mask_row,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, EXACT: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """A step of keys more in the sums of dS k."""
    key, entry = _gathered(entries, step, UNIT, STEP)
    keys = _rows(k, key, stride, column, there, inside, False, EXACT)
    values = _rows(v, key, stride, column, there, inside, False, EXACT)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * factor
    scores = _biased(
        scores, row[:, None], key[None, :], there[:, None], (key >= 0)[None, :],
        rpe, rpe_row, padding, mask, mask_row, RPE, PADDING, MASK,
    )  # fmt: skip
    if HIDES:
        part = (tl.arange(0, SIZE) // UNIT)[:, None]
        scores = _hidden(scores, entry[None, :], part, row[:, None], key[None, :], CAUSAL)
    weights = tl.exp2(scores - level[:, None])
    moved = tl.dot(grad, tl.trans(values), input_precision="ieee") - delta[:, None]
    return tl.dot((weights * moved).to(k.dtype.element_ty), keys, sums, input_precision="ieee")


@triton.jit
def _level(lse, at, there):
    """What to take from scores in powers of 2: the logarithm of the sum; inf for rows without."""
    found = tl.load(lse + at, mask=there, other=float("-inf"))
    return tl.where(found == float("-inf"), float("inf"), found * _LOG2E)


@triton.jit(do_not_specialize=_PLAIN)
def sparse_backward_queries(
    grad, q, k, v, out, lse, delta, dq, plan, rpe, padding, mask,
    tokens, width, heads, layout_heads, tiles, programs,
    stride_batch, stride_head, stride, out_batch, out_head, out_row,
    rpe_batch, rpe_head, rpe_row, padding_batch, mask_row, factor, scale,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, HEAD: tl.constexpr, EXACT: tl.constexpr, SIZE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A tile of dQ, and of delta, the sums of grad * out that keys and values need."""
    pair, tile, entries, full, groups = _work(plan, tiles, heads, layout_heads, programs // tiles)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = batch * stride_batch + head * stride_head
    second = batch * out_batch + head * out_head
    rpe += batch * rpe_batch + head * rpe_head
    padding += batch * padding_batch
    row = tile * SIZE + tl.arange(0, SIZE)
    there = row < tokens
    column = tl.arange(0, HEAD)
    inside = column < width
    own = _rows(q + first, row, stride, column, there, inside, True, EXACT)
    arrived = _rows(grad + second, row, out_row, column, there, inside, True, EXACT)
    result = _rows(out + second, row, out_row, column, there, inside, True, EXACT)
    inner = tl.sum(arrived.to(tl.float32) * result.to(tl.float32), 1)
    at = pair.to(tl.int64) * tokens + row
    tl.store(delta + at, inner, mask=there)
    level = _level(lse, at, there)
    sums = tl.zeros((SIZE, HEAD), tl.float32)
    for step in range(full * (SIZE // STEP)):
        sums = _query_gradient(
            sums, own, arrived, level, inner, k + first, v + first, entries, step, row, there,
            stride, column, inside, factor, rpe, rpe_row, padding, mask, mask_row,
            RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, False,
        )  # fmt: skip
    if UNIT < SIZE or CAUSAL:
        for step in range(full * (SIZE // STEP), groups * (SIZE // STEP)):
            sums = _query_gradient(
                sums, own, arrived, level, inner, k + first, v + first, entries, step, row, there,
                stride, column, inside, factor, rpe, rpe_row, padding, mask, mask_row,
                RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, True,
            )  # fmt: skip
    to = dq + second + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(to, (sums * scale).to(dq.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def _key_gradients(
    key_sums, value_sums, k, v, q, grad, lse, delta, entries, step, key, there, stride, out_row,
    column, inside, factor, rpe, rpe_row, padding, mask, mask_row,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, EXACT: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """A step of queries more in the sums of dS^T q and P^T grad."""
    row, entry = _gathered(entries, step, UNIT, STEP)
    queries = _rows(q, row, stride, column, there, inside, False, EXACT)
    arrived = _rows(grad, row, out_row, column, there, inside, False, EXACT)
    scores = tl.dot(k, tl.trans(queries), input_precision="ieee") * factor
    scores = _biased(
        scores, row[None, :], key[:, None], (row >= 0)[None, :], there[:, None],
        rpe, rpe_row, padding, mask, mask_row, RPE, PADDING, MASK,
    )  # fmt: skip
    if HIDES:
        part = (tl.arange(0, SIZE) // UNIT)[:, None]
        scores = _hidden(scores, entry[None, :], part, row[None, :], key[:, None], CAUSAL)
    weights = tl.exp2(scores - _level(lse, row, row >= 0)[None, :])
    value_sums = tl.dot(weights.to(grad.dtype.element_ty), arrived, value_sums,
                        input_precision="ieee")  # fmt: skip
    moved = tl.dot(v, tl.trans(arrived), input_precision="ieee") - tl.load(delta + row)[None, :]
    key_sums = tl.dot((weights * moved).to(q.dtype.element_ty), queries, key_sums,
                      input_precision="ieee")  # fmt: skip
    return key_sums, value_sums


@triton.jit(do_not_specialize=_PLAIN)
def sparse_backward_keys(
    grad, q, k, v, lse, delta, dk, dv, plan, rpe, padding, mask,
    tokens, width, heads, layout_heads, tiles, programs,
    stride_batch, stride_head, stride, out_batch, out_head, out_row,
    rpe_batch, rpe_head, rpe_row, padding_batch, mask_row, factor, scale,
    RPE: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, HEAD: tl.constexpr, EXACT: tl.constexpr, SIZE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A tile of dK and dV; scores and weights are turned, keys by queries."""
    pair, tile, entries, full, groups = _work(plan, tiles, heads, layout_heads, programs // tiles)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = batch * stride_batch + head * stride_head
    second = batch * out_batch + head * out_head
    rpe += batch * rpe_batch + head * rpe_head
    padding += batch * padding_batch
    lse += pair.to(tl.int64) * tokens
    delta += pair.to(tl.int64) * tokens
    key = tile * SIZE + tl.arange(0, SIZE)
    there = key < tokens
    column = tl.arange(0, HEAD)
    inside = column < width
    keys = _rows(k + first, key, stride, column, there, inside, True, EXACT)
    values = _rows(v + first, key, stride, column, there, inside, True, EXACT)
    key_sums = tl.zeros((SIZE, HEAD), tl.float32)
    value_sums = tl.zeros((SIZE, HEAD), tl.float32)
    for step in range(full * (SIZE // STEP)):
        key_sums, value_sums = _key_gradients(
            key_sums, value_sums, keys, values, q + first, grad + second, lse, delta, entries,
            step, key, there, stride, out_row, column, inside, factor,
            rpe, rpe_row, padding, mask, mask_row,
            RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, False,
        )  # fmt: skip
    if UNIT < SIZE or CAUSAL:
        for step in range(full * (SIZE // STEP), groups * (SIZE // STEP)):
            key_sums, value_sums = _key_gradients(
                key_sums, value_sums, keys, values, q + first, grad + second, lse, delta, entries,
                step, key, there, stride, out_row, column, inside, factor,
                rpe, rpe_row, padding, mask, mask_row,
                RPE, PADDING, MASK, CAUSAL, UNIT, SIZE, STEP, EXACT, True,
            )  # fmt: skip
    to = second + key.to(tl.int64)[:, None] * out_row + column[None, :]
    kept = there[:, None] & inside[None, :]
    tl.store(dk + to, (key_sums * scale).to(dk.dtype.element_ty), mask=kept)
    tl.store(dv + to, value_sums.to(dv.dtype.element_ty), mask=kept)


_NEW, _OLD = ("sm_90", "sm_100"), ("sm_80", "gfx942")


def _config(step: int, targets: tuple[str, ...], warps: int = 4, up_to: int = _MAX_HEAD) -> Config:
    """Steps of so many tokens along a list, for heads of some size at most."""
    return Config({"SIZE": TILE, "STEP": step}, {"head size": up_to}, warps, targets=targets)


#: What a step holds in registers is why it is not a tile everywhere: scores, bias and addresses.
_STEPS = (_config(64, _NEW), _config(32, _OLD))
_NARROW_STEPS = (_config(64, _NEW, up_to=64), _config(32, _OLD, up_to=64))
_TURNED = (
    *(_config(64, ("sm_100",)), _config(32, ("sm_90",), 8)),
    *(_config(16, ("sm_80",), 8), _config(16, ("gfx942",))),
)
_WIDE_QUERIES = (_config(32, (*_NEW, *_OLD)),)
_NARROW_TURNED = (
    _config(64, _NEW, up_to=64),
    *(_config(16, ("sm_80",), 8, up_to=64), _config(32, ("gfx942",), up_to=64)),
)
_SIZES = {
    "i32": " ".join(_PLAIN),
    "i32:16": "tokens width stride_batch stride_head stride out_batch out_head out_row "
    "rpe_batch rpe_head rpe_row padding_batch mask_row",
    "fp32": "factor",
}
_FORWARD_TYPES = {"*bf16": "q k v out rpe padding mask", "*fp32": "lse", "*i32": "plan", **_SIZES}
_QUERIES_TYPES = {
    "*bf16": "grad q k v out dq rpe padding mask",
    "*fp32": "lse delta",
    "*i32": "plan",
    **_SIZES,
    "fp32": "factor scale",
}
_KEYS_TYPES = {
    "*bf16": "grad q k v dk dv rpe padding mask",
    "*fp32": "lse delta",
    "*i32": "plan",
    **_SIZES,
    "fp32": "factor scale",
}


@dataclass(frozen=True)
class _Variants:
    """A function as it is compiled for calls of three kinds.

    Attributes:
        plain: wide blocks, seen whole, without bias and masks.
        narrow, wide: every option, for heads of 64 at most and for wider ones.
    """

    plain: Kernel
    narrow: Kernel
    wide: Kernel

    def choose(self, options: op.Options, d: int) -> Kernel:
        """The kernel for a call."""
        extra = (options.rpe, options.key_padding_mask, options.attn_mask)
        if unit_of(options.block) == TILE and not options.causal and extra == (None,) * 3:
            return self.plain
        return self.narrow if d <= 64 else self.wide


def _variants(
    function: Any, by_type: dict[str, str], narrow: tuple[Config, ...], wide: tuple[Config, ...]
) -> _Variants:
    plain = types(by_type, RPE=0, PADDING=0, MASK=0, CAUSAL=0, UNIT=64, HEAD=128, EXACT=1)
    every = types(by_type, RPE=1, PADDING=1, MASK=2, CAUSAL=1, UNIT=16, EXACT=1)
    return _Variants(
        Kernel(function, _STEPS, plain, MATRIX, "plain"),
        Kernel(function, narrow, {**every, "HEAD": 64}, MATRIX, "masked"),
        Kernel(function, wide, {**every, "HEAD": 128}, MATRIX, "masked_wide"),
    )


_FORWARD = _variants(sparse_forward, _FORWARD_TYPES, _NARROW_STEPS, _STEPS)
_QUERIES = _variants(sparse_backward_queries, _QUERIES_TYPES, _NARROW_STEPS, _WIDE_QUERIES)
_KEYS = _variants(sparse_backward_keys, _KEYS_TYPES, _NARROW_TURNED, _TURNED)
KERNELS = tuple(
    kernel
    for each in (_FORWARD, _QUERIES, _KEYS)
    for kernel in (each.plain, each.narrow, each.wide)
)


def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.sparse_attention.reference`."""
    out, lse = op.fake(q, k, v, *rest)
    options = op.Options(*rest)
    _expect(q, options)
    q, k, v = _alike(q, k, v)
    _launch(_FORWARD, options.rows, options, q, out, (q, k, v, out, lse))
    return out, lse


def sparse_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.sparse_attention.backward_reference`."""
    dq, dk, dv = op.backward_fake(grad, q, k, v, out, lse, *rest)
    options = op.Options(*rest)
    _expect(q, options)
    q, k, v = _alike(q, k, v)
    grad, out = (_strided_as(t, dq) for t in (grad, out))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    tensors = (grad, q, k, v, out, lse, delta, dq)
    _launch(_QUERIES, options.rows, options, q, dq, tensors, options.scale)
    tensors = (grad, q, k, v, lse, delta, dk, dv)
    _launch(_KEYS, options.columns, options, q, dq, tensors, options.scale)
    return dq, dk, dv


def _expect(q: torch.Tensor, options: op.Options) -> None:
    expect(q.dtype in FLOATS, op.NAME, "q", q.dtype, "fp32, bf16 or fp16")
    there = "a multiple of 16 (the reference takes any)"
    expect(unit_of(options.block) > 0, op.NAME, "block", options.block, there)
    least = 1 + 4 * options.blocks.shape[0] * blocks(q.shape[2], TILE)
    for name in ("rows", "columns"):
        listed: torch.Tensor = getattr(options, name)
        fits = listed.dtype is torch.int32 and listed.is_contiguous() and len(listed) >= least
        told = f"{listed.dtype} {list(listed.shape)}"
        expect(fits, op.NAME, name, told, "the list that BlockLayout makes")
        expect(listed.device == q.device, op.NAME, name, f"on {listed.device}", f"{q.device}")


def _alike(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, copied unless they lie alike in memory, rows side by side."""
    strides = {t.stride() for t in tensors}
    if len(strides) == 1 and tensors[0].stride(3) == 1:
        return list(tensors)
    return [t.contiguous() for t in tensors]


def _strided_as(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


def _launch(
    variants: _Variants,
    plan: torch.Tensor,
    options: op.Options,
    q: torch.Tensor,
    out: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *numbers: float,
) -> None:
    """Run a kernel for every tile; q, out: whose strides inputs and results have."""
    batch, heads, tokens, d = q.shape
    kernel = variants.choose(options, d)
    config = kernel.config(op.NAME, q.device, **{"head size": d})
    tiles = blocks(tokens, config.constants["SIZE"])
    programs = batch * heads * tiles
    rpe, padding, mask = options.rpe, options.key_padding_mask, options.attn_mask
    wide = triton.next_power_of_2(max(d, 16))
    if rpe is not None:
        rpe = (rpe if rpe.stride(3) == 1 else rpe.contiguous()).expand(batch, heads, -1, -1)
    padding, mask = (
        t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (padding, mask)
    )
    launch(
        *(kernel, config, (programs,)),
        *(*tensors, plan),
        *(q if t is None else t for t in (rpe, padding, mask)),
        *(tokens, d, heads, options.blocks.shape[0], tiles, programs),
        *(*q.stride()[:3], *out.stride()[:3]),
        *((0, 0, 0) if rpe is None else rpe.stride()[:3]),
        0 if padding is None else padding.stride(0),
        0 if mask is None else mask.stride(0),
        options.scale * _LOG2E.value,
        *numbers,
        RPE=rpe is not None,
        PADDING=0 if padding is None else 1 + options.key_mul,
        MASK=0 if mask is None else 1 + options.pair_mul,
        CAUSAL=options.causal,
        UNIT=unit_of(options.block),
        HEAD=wide,
        EXACT=wide == d,
    )
