"""Evoformer attention, forward and backward, a tile of scores at a time.

Scores never reach memory: at a width of 32 a tile of 64 x 64 takes 0.26 MFLOP a product and 8 KiB
of bias2, which all sequences share and find in the cache, for its programs lie side by side. Sums
over sequences (bias2), heads (bias1), queries and keys are each made by one program or from parts
in a fixed order, so that gradients are the same in every run; bias2's costs two more products.
"""

from __future__ import annotations

import torch

from ds_core.ops import evoformer_attention as op
from ds_ops.triton_kernels.evoformer_programs import (
    evoformer_dbias2,
    evoformer_dkv,
    evoformer_dq,
    evoformer_forward,
)
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import MATRIX, TARGETS, processors


def _config(
    rows: int, keys: int, width: int, warps: int = 4, targets: tuple[str, ...] = tuple(TARGETS)
) -> Config:
    sizes = {"ROWS": rows, "KEYS": keys, "WIDTH": width}
    return Config(sizes, {"width": width}, warps, targets=targets)


# What a matrix instruction's rows lie along is 64 wide, as Hopper's and Blackwell's need it. Tiles
# for wide heads are as large as registers allow, which differs.
_HALF = tuple(_config(64, 32, width) for width in (32, 64, 128))
_DKV_HALF = (
    _config(32, 64, 32),
    _config(32, 32, 64, 4, ("sm_80",)),
    _config(32, 64, 64, 4, ("sm_90", "sm_100", "gfx942")),
    _config(32, 64, 128, 8, ("sm_80", "sm_90", "sm_100")),
    _config(32, 32, 128, 4, ("gfx942",)),
)
_DBIAS2_HALF = (
    _config(64, 32, 32),
    _config(64, 32, 64),
    _config(64, 32, 128, 4, ("sm_80", "gfx942")),
    _config(64, 64, 128, 8, ("sm_90", "sm_100")),
)
_FLOAT = (_config(32, 32, 32), _config(16, 16, 128, 2))
_DKV_FLOAT = (_config(32, 32, 32), _config(16, 16, 128))

_SIZES = {"i32": "sequences heads", "i32:16": "length width", "fp32": "scale"}
_IN = "q k v bias1 bias2"
_GIVEN = f"grad {_IN}"


def _both(
    function: object,
    tensors: str,
    sums: str,
    sizes: str = "",
    *,
    configs: tuple[Config, ...],
    floats: tuple[Config, ...] = _FLOAT,
    **flags: bool,
) -> tuple[Kernel, Kernel]:
    """A kernel for tensors of 16 bits, and one for fp32, which no matrix instruction takes."""
    made = []
    for kind, table, instructions in (("bf16", configs, MATRIX), ("fp32", floats, {})):
        signature = types({f"*{kind}": tensors, **_SIZES}, **flags)
        signature |= types({"*fp32": sums, "i32": f"{_SIZES['i32']} {sizes}"})
        made.append(Kernel(function, table, signature, instructions, variant=kind))
    return made[0], made[1]


_FORWARD = _both(*(evoformer_forward, f"{_IN} out", "lse"), configs=_HALF, FIRST=True, SECOND=True)
_DQ = _both(
    *(evoformer_dq, f"{_GIVEN} out dq", "lse level"), configs=_HALF, FIRST=True, SECOND=True
)
_DKV = _both(
    *(evoformer_dkv, f"{_GIVEN} dk dv", "lse level dbias1"),
    configs=_DKV_HALF,
    floats=_DKV_FLOAT,
    FIRST=True,
    SECOND=True,
    WANTED=True,
)
_DBIAS2 = _both(
    *(evoformer_dbias2, _GIVEN, "lse level dbias2", "batches together"),
    configs=_DBIAS2_HALF,
    FIRST=True,
)
KERNELS = (*_FORWARD, *_DQ, *_DKV, *_DBIAS2)


def _chosen(kernels: tuple[Kernel, Kernel], q: torch.Tensor) -> tuple[Kernel, Config]:
    kernel = kernels[q.dtype is torch.float32]
    return kernel, kernel.config(op.NAME, q.device, width=q.shape[-1])


def evoformer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor | None,
    bias2: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ds_core.ops.evoformer_attention.reference`."""
    out, lse = op.fake(q, k, v, bias1, bias2, scale)
    expect_plain(op.NAME, q=q, k=k, v=v, bias1=bias1, bias2=bias2)
    batches, sequences, length, heads, width = q.shape
    kernel, config = _chosen(_FORWARD, q)
    programs = blocks(length, config.constants["ROWS"]) * batches * sequences * heads
    launch(
        *(kernel, config, (programs,), q, k, v),
        *(q if bias is None else bias for bias in (bias1, bias2)),
        *(out, lse, sequences, length, heads, width, scale),
        FIRST=bias1 is not None,
        SECOND=bias2 is not None,
    )
    return out, lse


def evoformer_attention_backward(
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
    """As `ds_core.ops.evoformer_attention.backward_reference`."""
    results = op.backward_fake(grad, q, k, v, bias1, bias2, out, lse, scale, wants)
    given = {"grad": grad, "q": q, "k": k, "v": v, "bias1": bias1, "bias2": bias2}
    expect_plain(op.BACKWARD, out=out, lse=lse, **given)
    batches, sequences, length, heads, width = q.shape
    dq, dk, dv, dbias1, dbias2 = results
    inputs = [q if t is None else t for t in given.values()]
    sizes = (sequences, length, heads, width, scale)
    biased: dict[str, int | bool] = {"FIRST": bias1 is not None, "SECOND": bias2 is not None}
    level = torch.empty_like(lse)
    lines = batches * sequences * heads
    kernel, config = _chosen(_DQ, q)
    grid = (lines * blocks(length, config.constants["ROWS"]),)
    launch(kernel, config, grid, *inputs, out, lse, level, dq, *sizes, **biased)
    kernel, config = _chosen(_DKV, q)
    grid = (lines * blocks(length, config.constants["KEYS"]),)
    wanted = dbias1.dim() > 1
    parts = torch.empty_like(lse) if wanted else lse
    tensors = (*inputs, lse, level, dk, dv, parts)
    launch(kernel, config, grid, *tensors, *sizes, WANTED=wanted, **biased)
    if wanted:
        dbias1 = parts.sum(2).to(q.dtype).view(dbias1.shape)
    if dbias2.dim() > 1:
        dbias2 = _dbias2(inputs, lse, level, scale, bias1 is not None)
    return dq, dk, dv, dbias1, dbias2


def _dbias2(
    inputs: list[torch.Tensor], lse: torch.Tensor, level: torch.Tensor, scale: float, first: bool
) -> torch.Tensor:
    """bias2's gradient, of as many parts as it takes to keep the device busy."""
    q = inputs[1]
    batches, sequences, length, heads, width = q.shape
    kernel, config = _chosen(_DBIAS2, q)
    tiles = blocks(length, config.constants["ROWS"]) * blocks(length, config.constants["KEYS"])
    tiles *= batches * heads
    parts = min(sequences, blocks(4 * processors(q.device), max(1, tiles)))
    together = blocks(sequences, max(1, parts))
    parts = blocks(sequences, max(1, together))
    found = lse.new_empty((parts, batches, heads, length, length))
    sizes = (batches, sequences, together, length, heads, width, scale)
    grid = (tiles * parts,)
    launch(kernel, config, grid, *inputs, lse, level, found, *sizes, FIRST=first)
    return found.sum(0).to(q.dtype).unsqueeze(1)
