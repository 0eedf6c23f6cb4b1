"""Evoformer attention, forward and backward, a tile of scores at a time.

Scores never reach memory: at a width of 32 a tile of 64 x 64 takes 0.26 MFLOP a product and 8 KiB
of bias2, which all sequences share and find in the cache, for its programs lie side by side. Sums
over sequences (bias2), heads (bias1), queries and keys are each made by one program or from parts
in a fixed order, so that gradients are the same in every run; bias2's costs two more products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import evoformer_attention as op
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import MATRIX, TARGETS, processors

# Exponentials are of base 2, as the hardware's: scores are multiplied by log2(e).
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(base, row, rows, stride, column, width):
    """Rows of q, k, v or of what is like them; 0 from `rows` on."""
    mask = (row < rows)[:, None] & (column < width)[None, :]
    return tl.load(base + (row[:, None] * stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _put(base, value, row, rows, stride, column, width):
    """Write rows that `_tile` would read."""
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * stride + column[None, :]
    tl.store(base + at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _biased(
    scores,
    bias1,
    bias2,
    query,
    key,
    queries,
    keys,
    length,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Scores with the biases, times log2(e); -inf from key `keys` on.

    query and key: places in the tile, `[n, 1]` and `[1, m]`, whichever way it lies; the biases
    begin where it does.
    """
    scores = scores * _LOG2E
    if FIRST:
        scores += tl.load(bias1 + key, mask=key < keys, other=0.0).to(tl.float32) * _LOG2E
    if SECOND:
        inside = (query < queries) & (key < keys)
        pairs = tl.load(bias2 + (query * length + key), mask=inside, other=0.0)
        scores += pairs.to(tl.float32) * _LOG2E
    return tl.where(key < keys, scores, float("-inf"))


@triton.jit
def _sums(lse, row, rows):
    """The logarithms to base 2 of rows' sums; 0 for one whose keys are all at -inf.

    Infinity from `rows` on, whose weights then are 0 however large a key's bias is.
    """
    value = tl.load(lse + row, mask=row < rows, other=float("inf")) * _LOG2E
    return tl.where(value == float("-inf"), 0.0, value)


#: Numbers of alignments and heads, which change from call to call: one code for all.
_PLAIN = ["sequences", "heads", "batches", "together"]


@triton.jit(do_not_specialize=_PLAIN)
def evoformer_forward(
    q,
    k,
    v,
    bias1,
    bias2,
    out,
    lse,
    sequences,
    length,
    heads,
    width,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS queries of one head of one sequence."""
    tiles = tl.cdiv(length, ROWS)
    tile = tl.program_id(0) % tiles
    place = (tl.program_id(0) // tiles).to(tl.int64)
    sequence, head = place % sequences, place // sequences % heads
    batch = place // sequences // heads
    row, key, column = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    stride, first = heads * width, tile.to(tl.int64) * ROWS
    rows = length - tile * ROWS
    begin = ((batch * sequences + sequence) * length * heads + head) * width
    k += begin
    v += begin
    bias1 += (batch * sequences + sequence) * length
    bias2 += ((batch * heads + head) * length + first) * length
    queries = _tile(q + begin + first * stride, row, rows, stride, column, width)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, length, KEYS):
        left = length - start
        keys = _tile(k, key, left, stride, column, width)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        s = _biased(s, bias1, bias2, row[:, None], key[None, :], rows, left, length, FIRST, SECOND)
        higher = tl.maximum(top, tl.max(s, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(p, axis=1)
        values = _tile(v, key, left, stride, column, width)
        mixed = tl.dot(p.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
        top = higher
        k += KEYS * stride
        v += KEYS * stride
        bias1 += KEYS
        bias2 += KEYS
    dead = total == 0.0
    mixed = mixed / tl.where(dead, 1.0, total)[:, None]
    _put(out + begin + first * stride, mixed, row, rows, stride, column, width)
    logarithm = tl.where(dead, float("-inf"), top * _LN2 + tl.log(total))
    own = ((batch * sequences + sequence) * heads + head) * length + first
    tl.store(lse + own + row, logarithm, mask=row < rows)


@triton.jit(do_not_specialize=_PLAIN)
def evoformer_dq(
    grad,
    q,
    k,
    v,
    bias1,
    bias2,
    out,
    lse,
    level,
    dq,
    sequences,
    length,
    heads,
    width,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS rows of dq, and their rowsum(grad * out), laid out as lse, for the other kernels."""
    tiles = tl.cdiv(length, ROWS)
    tile = tl.program_id(0) % tiles
    place = (tl.program_id(0) // tiles).to(tl.int64)
    sequence, head = place % sequences, place // sequences % heads
    batch = place // sequences // heads
    row, key, column = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    stride, first = heads * width, tile.to(tl.int64) * ROWS
    rows = length - tile * ROWS
    begin = ((batch * sequences + sequence) * length * heads + head) * width
    own = ((batch * sequences + sequence) * heads + head) * length + first
    k += begin
    v += begin
    begin += first * stride
    bias1 += (batch * sequences + sequence) * length
    bias2 += ((batch * heads + head) * length + first) * length
    arrived = _tile(grad + begin, row, rows, stride, column, width)
    results = _tile(out + begin, row, rows, stride, column, width)
    middle = tl.sum(arrived.to(tl.float32) * results.to(tl.float32), axis=1)
    tl.store(level + own + row, middle, mask=row < rows)
    queries = _tile(q + begin, row, rows, stride, column, width)
    sums = _sums(lse + own, row, rows)
    slope = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, length, KEYS):
        left = length - start
        keys = _tile(k, key, left, stride, column, width)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        s = _biased(s, bias1, bias2, row[:, None], key[None, :], rows, left, length, FIRST, SECOND)
        p = tl.exp2(s - sums[:, None])
        values = _tile(v, key, left, stride, column, width)
        ds = p * (tl.dot(arrived, tl.trans(values), input_precision="ieee") - middle[:, None])
        slope = tl.dot(ds.to(keys.dtype), keys, slope, input_precision="ieee")
        k += KEYS * stride
        v += KEYS * stride
        bias1 += KEYS
        bias2 += KEYS
    _put(dq + begin, slope * scale, row, rows, stride, column, width)


@triton.jit(do_not_specialize=_PLAIN)
def evoformer_dkv(
    grad,
    q,
    k,
    v,
    bias1,
    bias2,
    lse,
    level,
    dk,
    dv,
    dbias1,
    sequences,
    length,
    heads,
    width,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WANTED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """KEYS rows of dk and dv; WANTED: and this head's part of dbias1, laid out as lse.

    The tile of scores lies with the keys first, as the products that follow need it.
    """
    tiles = tl.cdiv(length, KEYS)
    tile = tl.program_id(0) % tiles
    place = (tl.program_id(0) // tiles).to(tl.int64)
    sequence, head = place % sequences, place // sequences % heads
    batch = place // sequences // heads
    row, key, column = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    stride, first = heads * width, tile.to(tl.int64) * KEYS
    there = length - tile * KEYS
    begin = ((batch * sequences + sequence) * length * heads + head) * width
    own = ((batch * sequences + sequence) * heads + head) * length
    q += begin
    grad += begin
    lse += own
    level += own
    begin += first * stride
    bias1 += (batch * sequences + sequence) * length + first
    bias2 += (batch * heads + head) * length * length + first
    keys = _tile(k + begin, key, there, stride, column, width)
    values = _tile(v + begin, key, there, stride, column, width)
    key_slope = tl.zeros((KEYS, WIDTH), tl.float32)
    value_slope = tl.zeros((KEYS, WIDTH), tl.float32)
    bias_slope = tl.zeros((KEYS,), tl.float32)
    for start in range(0, length, ROWS):
        left = length - start
        queries = _tile(q, row, left, stride, column, width)
        arrived = _tile(grad, row, left, stride, column, width)
        s = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
        s = _biased(s, bias1, bias2, row[None, :], key[:, None], left, there, length, FIRST, SECOND)
        p = tl.exp2(s - _sums(lse, row, left)[None, :])
        value_slope = tl.dot(p.to(arrived.dtype), arrived, value_slope, input_precision="ieee")
        middle = tl.load(level + row, mask=row < left, other=0.0)
        ds = p * (tl.dot(values, tl.trans(arrived), input_precision="ieee") - middle[None, :])
        key_slope = tl.dot(ds.to(queries.dtype), queries, key_slope, input_precision="ieee")
        if WANTED:
            bias_slope += tl.sum(ds, axis=1)
        q += ROWS * stride
        grad += ROWS * stride
        lse += ROWS
        level += ROWS
        bias2 += ROWS * length
    _put(dk + begin, key_slope * scale, key, there, stride, column, width)
    _put(dv + begin, value_slope, key, there, stride, column, width)
    if WANTED:
        tl.store(dbias1 + own + first + key, bias_slope, mask=key < there)


@triton.jit(do_not_specialize=_PLAIN)
def evoformer_dbias2(
    grad,
    q,
    k,
    v,
    bias1,
    bias2,
    lse,
    level,
    dbias2,
    batches,
    sequences,
    together,
    length,
    heads,
    width,
    scale,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tile of bias2's gradient, summed over `together` sequences.

    dbias2: `[parts, batch, heads, length, length]`, of the sequences from part * together on.
    """
    across, down = tl.cdiv(length, KEYS), tl.cdiv(length, ROWS)
    tile = tl.program_id(0) % (across * down)
    place = (tl.program_id(0) // (across * down)).to(tl.int64)
    head, batch, part = place % heads, place // heads % batches, place // heads // batches
    row, key, column = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    stride = heads * width
    first_row, first_key = tile // across * ROWS, tile % across * KEYS
    rows, keys_left = length - first_row, length - first_key
    inside = (row < rows)[:, None] & (key < keys_left)[None, :]
    at = first_row.to(tl.int64) * length + first_key
    near = row[:, None] * length + key[None, :]
    pairs = tl.load(
        bias2 + (batch * heads + head) * length * length + at + near, mask=inside, other=0.0
    )
    begin = (batch * sequences + part * together) * length
    bias1 += begin + first_key
    own = begin * heads + head * length + first_row
    lse += own
    level += own
    begin = (begin * heads + head) * width
    from_row = begin + first_row.to(tl.int64) * stride
    from_key = begin + first_key.to(tl.int64) * stride
    q += from_row
    grad += from_row
    k += from_key
    v += from_key
    slope = tl.zeros((ROWS, KEYS), tl.float32)
    for _ in range(tl.minimum(together, sequences - part * together)):
        queries = _tile(q, row, rows, stride, column, width)
        keys = _tile(k, key, keys_left, stride, column, width)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        s += pairs.to(tl.float32)
        s = _biased(
            s, bias1, bias2, row[:, None], key[None, :], rows, keys_left, length, FIRST, False
        )
        p = tl.exp2(s - _sums(lse, row, rows)[:, None])
        arrived = _tile(grad, row, rows, stride, column, width)
        values = _tile(v, key, keys_left, stride, column, width)
        middle = tl.load(level + row, mask=row < rows, other=0.0)
        slope += p * (tl.dot(arrived, tl.trans(values), input_precision="ieee") - middle[:, None])
        q += length * stride
        k += length * stride
        v += length * stride
        grad += length * stride
        bias1 += length
        lse += length * heads
        level += length * heads
    target = dbias2 + ((part * batches + batch) * heads + head) * length * length + at
    tl.store(target + near, slope.to(dbias2.dtype.element_ty), mask=inside)


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
