"""Attention over a cache in pages: prefill, decode and both in one launch.

Rows of a tile are query tokens times the heads that share a key-value head, so that a key is read
once for all of them. Which sequence a tile is for is worked out on the device from query_starts,
into how many parts the keys are cut from shapes alone: the host waits for nothing, and a CUDA graph
holds for other lengths. Decode moves the cache once: 16 rows, the least a matrix instruction takes,
by 64 keys, and keys cut so that twice as many programs run as there are processors. Prefill
computes: a tile re-uses each key 32 to 128 times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_core.ops import paged_attention as op
from ds_core.ops.arguments import expect
from ds_ops.triton_kernels.fp8_bits import FORMATS, widened
from ds_ops.triton_kernels.kernel import Config, Kernel, blocks, expect_plain, types
from ds_ops.triton_kernels.launching import launch
from ds_ops.triton_kernels.targets import MATRIX, processors

#: e^x = 2^(x * this).
_LOG2_E = tl.constexpr(1.4426950408889634)
#: Keys are cut into at most so many parts, each of at least so many keys.
_MOST_PARTS, _LEAST_KEYS = 64, 256
#: Rows of a tile for which matrix instructions are fullest, if a sequence has no more.
_FEW_ROWS = 16
#: A window that every key is in.
_NO_WINDOW = 2**30


@triton.jit
def _sequence_of(starts, sequences, group, tile, M: tl.constexpr):
    """The sequence whose rows a tile is for: tiles of one begin at `starts * group // M` + it.

    That leaves each sequence as many tiles as it has rows for, and at most one without.
    """
    found = 0
    for begin in range(0, sequences, 256):
        sequence = begin + tl.arange(0, 256)
        there = sequence < sequences
        first = tl.load(starts + sequence, mask=there, other=0) * group // M + sequence
        found += tl.sum((there & (first <= tile)).to(tl.int32), axis=0)
    return tl.maximum(found - 1, 0)


#: Numbers that change from step to step of a decode, or that no address depends on: one code for
#: all.
_PLAIN = [
    *("tokens", "sequences", "width", "pages", "kv_heads", "group"),
    *("k_step", "v_step", "window", "parts"),
]


@triton.jit(do_not_specialize=_PLAIN)
def paged_attention_tile(
    q,
    k,
    v,
    table,
    lengths,
    starts,
    k_scale,
    v_scale,
    out,
    sums,
    maxima,
    weights,
    tokens,
    sequences,
    width,
    pages,
    page_size,
    kv_heads,
    group,
    head_size,
    page_stride,
    token_stride,
    head_stride,
    k_step,
    v_step,
    window,
    scale,
    softcap,
    parts,
    FORMAT: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    FULL: tl.constexpr,
    K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    HEAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """M rows of one key-value head; with SPLIT over one of `parts` parts of their keys.

    FULL: a head has HEAD elements. SPLIT: sums of values, not yet divided, with the maxima of
    scores and the sums of weights go to memory in fp32, `[tokens, heads, parts, head_size]` and
    `[tokens, heads, parts]`.
    """
    head = tl.program_id(0) % kv_heads
    tile = tl.program_id(0) // kv_heads
    part = tl.program_id(1)
    sequence = _sequence_of(starts, sequences, group, tile, M)
    begin = tl.load(starts + sequence)
    queries = tl.load(starts + sequence + 1) - begin
    length = tl.load(lengths + sequence)
    first_row = (tile - begin * group // M - sequence) * M
    if first_row >= queries * group:
        return
    row = first_row + tl.arange(0, M)
    query = row // group
    token = begin + query
    there = (query < queries) & (token >= 0) & (token < tokens)
    position = length - queries + query
    column = tl.arange(0, HEAD)
    used = column < head_size
    heads = kv_heads * group
    out_row = token.to(tl.int64) * heads + head * group + row % group
    at = out_row[:, None] * head_size + column[None, :]
    rows = tl.load(q + at, mask=there[:, None] & used[None, :], other=0.0)

    needed = 0
    if WINDOWED:
        needed = tl.maximum(length - queries + first_row // group - window + 1, 0)
    stop = length - queries + tl.minimum((first_row + M - 1) // group, queries - 1) + 1
    start = needed // N * N
    if SPLIT:
        span = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), N), parts) * N
        start += part * span
        stop = tl.minimum(stop, start + span)
    factor = scale
    if K_SCALED:
        factor *= tl.load(k_scale + head * k_step)
    # Heads may lie as far apart as a whole cache.
    k += head.to(tl.int64) * head_stride
    v += head.to(tl.int64) * head_stride
    table += sequence.to(tl.int64) * width
    largest = tl.full((M,), float("-inf"), tl.float32)
    weight = tl.zeros((M,), tl.float32)
    total = tl.zeros((M, HEAD), tl.float32)
    for begin_key in range(start, stop, N):
        key = begin_key + tl.arange(0, N)
        inside = (key >= needed) & (key < stop)
        page = key // page_size
        number = tl.load(table + page, mask=inside & (page < width), other=-1)
        known = inside & (number >= 0) & (number < pages)
        place = number.to(tl.int64) * page_stride + key % page_size * token_stride
        key_mask = known[None, :] if FULL else known[None, :] & used[:, None]
        key_tile = tl.load(k + place[None, :] + column[:, None], mask=key_mask, other=0)
        if FORMAT:
            key_tile = widened(key_tile, rows.dtype, FORMAT)
        score = tl.dot(rows, key_tile, input_precision="ieee") * factor
        if CAPPED:
            score = softcap * (2.0 / (1.0 + tl.exp(-2.0 * score / softcap)) - 1.0)
        # Keys outside of [needed, stop) are seen by no row.
        lost = tl.where(inside & (number < 0) | (number >= pages), float("nan"), 0.0)
        seen = key[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        score = tl.where(seen, score * _LOG2_E + lost[None, :], float("-inf"))
        larger = tl.maximum(largest, tl.max(score, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        share = tl.exp2(score - base[:, None])
        kept = tl.exp2(largest - base)
        weight = weight * kept + tl.sum(share, axis=1)
        value_mask = known[:, None] if FULL else known[:, None] & used[None, :]
        value_tile = tl.load(v + place[:, None] + column[None, :], mask=value_mask, other=0)
        if FORMAT:
            value_tile = widened(value_tile, rows.dtype, FORMAT)
        total = total * kept[:, None]
        total = tl.dot(share.to(rows.dtype), value_tile, total, input_precision="ieee")
        largest = larger
    mask = there[:, None] & used[None, :]
    if SPLIT:
        slot = out_row * parts + part
        tl.store(maxima + slot, largest, mask=there)
        tl.store(weights + slot, weight, mask=there)
        tl.store(sums + slot[:, None] * head_size + column[None, :], total, mask=mask)
    else:
        if V_SCALED:
            total *= tl.load(v_scale + head * v_step)
        tl.store(out + at, (total / weight[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads", *_PLAIN])
def paged_attention_combine(
    sums,
    maxima,
    weights,
    v_scale,
    out,
    heads,
    group,
    head_size,
    v_step,
    parts,
    V_SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """One row of the result from its parts, PARTS at a time, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HEAD)
    largest = float("-inf")
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        some = tl.load(maxima + row * parts + part, mask=part < parts, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(some, axis=0))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight = 0.0
    total = tl.zeros((HEAD,), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        slot = row * parts + part
        some = tl.load(maxima + slot, mask=part < parts, other=float("-inf"))
        share = tl.exp2(some - base)
        weight += tl.sum(share * tl.load(weights + slot, mask=part < parts, other=0.0), axis=0)
        values = tl.load(
            sums + slot[:, None] * head_size + column[None, :],
            mask=(part < parts)[:, None] & (column < head_size)[None, :],
            other=0.0,
        )
        total += tl.sum(values * share[:, None], axis=0)
    if V_SCALED:
        total *= tl.load(v_scale + row % heads // group * v_step)
    result = (total / weight).to(out.dtype.element_ty)
    tl.store(out + row * head_size + column, result, mask=column < head_size)


_AMD = ("gfx942",)
_NVIDIA = ("sm_80", "sm_90", "sm_100")
# On gfx942 masks take scalar registers, of which there are few: 16 keys at a time.
_TILES = (
    Config({"HEAD": 128, "M": 64, "N": 64}, {"head size": 128}, 8, 2, ("sm_80",)),
    Config({"HEAD": 128, "M": 128, "N": 64}, {"head size": 128}, 8, 2, ("sm_90", "sm_100")),
    Config({"HEAD": 128, "M": 64, "N": 16}, {"head size": 128}, 4, 1, _AMD),
    Config({"HEAD": 256, "M": 64, "N": 32}, {"head size": 256}, 8, 1, ("sm_80",)),
    Config({"HEAD": 256, "M": 64, "N": 32}, {"head size": 256}, 8, 2, ("sm_90", "sm_100")),
    Config({"HEAD": 256, "M": 32, "N": 16}, {"head size": 256}, 4, 1, _AMD),
)
_FEW = (
    Config({"HEAD": 128, "M": 16, "N": 64}, {"head size": 128}, 4, 3, _NVIDIA),
    Config({"HEAD": 128, "M": 16, "N": 32}, {"head size": 128}, 4, 1, _AMD),
    Config({"HEAD": 256, "M": 16, "N": 32}, {"head size": 256}, 4, 3, _NVIDIA),
    Config({"HEAD": 256, "M": 16, "N": 16}, {"head size": 256}, 4, 1, _AMD),
)
_WIDE = (
    Config({"HEAD": 128, "M": 32, "N": 32}, {"head size": 128}, 8, 1, _NVIDIA),
    Config({"HEAD": 128, "M": 32, "N": 16}, {"head size": 128}, 4, 1, _AMD),
    Config({"HEAD": 256, "M": 16, "N": 16}, {"head size": 256}, 4, 1),
)
_SHAPES = {
    "*i32": "table lengths starts",
    "*fp32": "k_scale v_scale sums maxima weights",
    "i32": " ".join(_PLAIN),
    "i32:16": "page_size head_size page_stride token_stride head_stride",
    "fp32": "scale softcap",
}


def _kernel(
    variant: str, configs: tuple[Config, ...], element: str, cache: str, **constants: bool | int
) -> Kernel:
    by_type = dict(_SHAPES)
    for kind, names in ((f"*{element}", "q out"), (f"*{cache}", "k v")):
        by_type[kind] = f"{by_type.get(kind, '')} {names}"
    # Small tiles are multiplied by the instructions that sm_80 has.
    small = dict(MATRIX) | dict.fromkeys(("sm_90", "sm_100"), MATRIX["sm_80"])
    needed = {"fp32": {}, "bf16": small if configs is _FEW else MATRIX}[element]
    scaled = {"K_SCALED": cache == "u8", "V_SCALED": cache == "u8"}
    given = types(by_type, FORMAT=int(cache == "u8"), FULL=element != "fp32", **scaled, **constants)
    return Kernel(paged_attention_tile, configs, given, needed, variant)


_PREFILL = _kernel("prefill", _TILES, "bf16", "bf16", CAPPED=True, WINDOWED=True, SPLIT=False)
_PREFILL_FP8 = _kernel(
    "prefill_fp8", _TILES, "bf16", "u8", CAPPED=False, WINDOWED=False, SPLIT=False
)
_DECODE = _kernel("decode", _FEW, "bf16", "bf16", CAPPED=False, WINDOWED=False, SPLIT=True)
_DECODE_FP8 = _kernel("decode_fp8", _FEW, "bf16", "u8", CAPPED=False, WINDOWED=False, SPLIT=True)
_FP32 = _kernel("fp32", _WIDE, "fp32", "fp32", CAPPED=True, WINDOWED=True, SPLIT=True)
_COMBINE = Kernel(
    paged_attention_combine,
    (Config({"PARTS": 8, "HEAD": 256}, {"head size": 256}, warps=4),),
    types(
        {
            "*fp32": "sums maxima weights v_scale",
            "*bf16": "out",
            "i32": "heads group v_step parts",
            "i32:16": "head_size",
        },
        V_SCALED=True,
    ),
)
KERNELS = (_PREFILL, _PREFILL_FP8, _DECODE, _DECODE_FP8, _FP32, _COMBINE)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence_lengths: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `ds_core.ops.paged_attention.reference`; lists of numbers on a GPU are not looked at."""
    lists = (block_table, sequence_lengths, query_starts)
    out = op.fake(q, k_cache, v_cache, *lists, scale, window, softcap, k_scale, v_scale)
    _expect_strides(k_cache, v_cache)
    expect_plain(
        op.NAME, q=q, block_table=block_table, sequence_lengths=sequence_lengths,
        query_starts=query_starts, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    if q.device.type == "cpu":  # the interpreter's, which nothing waits for
        op.check_values(q, k_cache, *lists)
    tokens, heads, head_size = q.shape
    sequences, width = block_table.shape
    if tokens == 0 or sequences == 0:
        return out
    pages, page_size, kv_heads = k_cache.shape[:3]
    group = heads // kv_heads
    fp8 = FORMATS.get(k_cache.dtype, 0)
    if fp8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    kernel = _kernel_for(q, fp8 > 0, rows=blocks(tokens * group, sequences))
    config = kernel.config(op.NAME, q.device, **{"head size": head_size})
    combine = _COMBINE.config(op.NAME, q.device, **{"head size": head_size})
    tile = config.constants["M"]
    programs = (tokens * group // tile + sequences) * kv_heads
    reach = width * page_size if window is None else min(width * page_size, window + tile)
    parts = _parts(programs, reach, q.device)
    room = (tokens, heads, parts) if parts > 1 else (0,)
    sums = q.new_empty((*room, head_size), dtype=torch.float32)
    maxima, weights = (q.new_empty(room, dtype=torch.float32) for _ in range(2))
    scales = [sums if t is None else t for t in (k_scale, v_scale)]
    steps = [int(t is not None and t.numel() > 1) for t in (k_scale, v_scale)]
    launch(
        *(kernel, config, (programs, parts)),
        *(q, k_cache, v_cache, *lists, *scales, out, sums, maxima, weights),
        *(tokens, sequences, width, pages, page_size, kv_heads, group, head_size),
        *(*k_cache.stride()[:3], *steps, min(window or _NO_WINDOW, _NO_WINDOW)),
        *(scale, softcap or 0.0, parts),
        FORMAT=fp8,
        CAPPED=softcap is not None,
        WINDOWED=window is not None,
        FULL=head_size == config.constants["HEAD"],
        K_SCALED=k_scale is not None,
        V_SCALED=v_scale is not None,
        SPLIT=parts > 1,
    )
    if parts > 1:
        launch(
            *(_COMBINE, combine, (tokens * heads,), sums, maxima, weights, scales[1], out),
            *(heads, group, head_size, steps[1], parts),
            V_SCALED=v_scale is not None,
        )
    return out


def _kernel_for(q: torch.Tensor, fp8: bool, rows: int) -> Kernel:
    """The kernel for sequences of so many rows each, on average."""
    if q.dtype is torch.float32:
        return _FP32
    if rows <= _FEW_ROWS:
        return _DECODE_FP8 if fp8 else _DECODE
    return _PREFILL_FP8 if fp8 else _PREFILL


def _parts(programs: int, reach: int, device: torch.device) -> int:
    """Into how many parts keys are cut, so that each processor has two programs."""
    wanted = 2 * processors(device) // programs
    return max(1, min(wanted, reach // _LEAST_KEYS, _MOST_PARTS))


def _expect_strides(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    strides = f"strides {list(k_cache.stride())}"
    expect(k_cache.stride(3) == 1, op.NAME, "k_cache", strides, "1 for the last dimension")
    strides = f"strides {list(v_cache.stride())}"
    same = k_cache.stride() == v_cache.stride() or k_cache.numel() == 0
    expect(same, op.NAME, "v_cache", strides, f"k_cache's {list(k_cache.stride())}")
