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

from ds_core.ops import sparse_attention as op
from ds_core.ops.arguments import FLOATS, expect
from ds_core.ops.block_layout import TILE, unit_of
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.sparse_attention_programs import (
    LOG2E,
    MAX_HEAD,
    PLAIN,
    sparse_backward_keys,
    sparse_backward_queries,
    sparse_forward,
)
from ds_ops.triton_kernels.targets import MATRIX

_NEW, _OLD = ("sm_90", "sm_100"), ("sm_80", "gfx942")


def _config(step: int, targets: tuple[str, ...], warps: int = 4, up_to: int = MAX_HEAD) -> Config:
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
    "i32": " ".join(PLAIN),
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
        options.scale * LOG2E.value,
        *numbers,
        RPE=rpe is not None,
        PADDING=0 if padding is None else 1 + options.key_mul,
        MASK=0 if mask is None else 1 + options.pair_mul,
        CAUSAL=options.causal,
        UNIT=unit_of(options.block),
        HEAD=wide,
        EXACT=wide == d,
    )
