"""Attention of ragged sequences over keys and values in blocks of a cache.

Source: Kwon et al. 2023, section 4.1 (blocks); Milakov and Gimelshein 2018 and Dao et al. 2023
(softmax in one pass, cut along the keys); Ainslie et al. 2023 (shared key-value heads).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ds_core.ops.arguments import (
    FLOATS,
    expect,
    expect_float,
    expect_shape,
    expect_tensors,
    expect_together,
    wide,
    wide_dtype,
)
from ds_core.ops.kv_cache import FP8, as_cached, expect_scales, from_cache
from ds_core.ops.registry import run
from ds_core.ops.tolerance import CLASS
from ds_core.seams.op import Floor, Op

NAME = "paged_attention"
#: Head sizes that kernels take.
HEAD_SIZES = (16, 512)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence_lengths: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the newest tokens of each sequence over all its keys in the cache.

    Prefill (many queries), decode (one query) and anything between them may be mixed in one call.
    The keys and values of the queries' own tokens are in the cache already (`write_kv_cache`).

    Args:
        q: `[tokens, heads, d]`, the queries of all sequences one behind the other; d from 16 to
            512; fp32, bf16 or fp16. Computed in fp32.
        k_cache, v_cache: `[blocks, block_size, kv_heads, d]`, both of q's dtype, or both
            float8_e4m3fn or float8_e5m2; heads is a multiple of kv_heads. May be views with equal
            strides whose last dimension is contiguous, such as the halves of
            `[blocks, block_size, 2, kv_heads, d]`.
        block_table: `[sequences, max_blocks]`, int32: key `i` of a sequence is at
            `[block_table[sequence, i // block_size], i % block_size]`. Entries that no key needs,
            and memory that no key is in, are not looked at.
        sequence_lengths: `[sequences]`, int32: keys of each sequence, its queries' included. Its
            queries are its last tokens.
        query_starts: `[sequences + 1]`, int32: where each sequence's queries begin in q; the first
            is 0, the last `tokens`. A sequence may have no query.
        scale: of the scores; None: `1 / sqrt(d)`.
        window: each query sees this many keys, itself included; None: all before it.
        softcap: scores become `softcap * tanh(score / softcap)`; None: they stay.
        k_scale, v_scale: `[1]` or `[kv_heads]`, fp32, for caches of 8-bit floats: by what their
            numbers are multiplied. None: 1.

    Returns `[tokens, heads, d]`, q's dtype. The same call gives the same bits every time. On a CPU
    the result of a sequence is also the same with any number of threads and whatever else is in
    the call; on a GPU its last bits may change with the shapes of the call, for they decide how
    keys are shared out. No gradient.

    Raises OpError or RuntimeError for shapes, dtypes, lengths or blocks that do not fit. On a GPU
    lengths, blocks and query_starts are not looked at, for the host would have to wait for them:
    nothing outside of the tensors is read or written, queries that need a block outside of the
    cache or of the table become NaN, and those of no sequence are whatever memory held.
    """
    expect_tensors(NAME, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    expect_tensors(NAME, sequence_lengths=sequence_lengths, query_starts=query_starts)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    result: torch.Tensor = run(
        NAME,
        *(q, k_cache, v_cache, block_table, sequence_lengths, query_starts),
        *(scale, window, softcap, k_scale, v_scale),
    )
    return result


def reference(
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
    """As `paged_attention`, sequence by sequence: `softmax(scale * q k^T) v` with a mask."""
    lists = (block_table, sequence_lengths, query_starts)
    _check(q, k_cache, v_cache, *lists, scale, window, softcap, k_scale, v_scale)
    check_values(q, k_cache, block_table, sequence_lengths, query_starts)
    block_size, kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // kv_heads
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    for sequence, length in enumerate(sequence_lengths.tolist()):
        begin, end = starts[sequence], starts[sequence + 1]
        if begin == end:
            continue
        blocks = block_table[sequence, : -(-length // block_size)].long()
        k, v = (
            from_cache(cache[blocks].flatten(0, 1)[:length], factor, wide_dtype(q.dtype))
            .repeat_interleave(group, 1)
            .transpose(0, 1)
            for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
        )
        scores = wide(q[begin:end]).transpose(0, 1) @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        positions = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        keys = torch.arange(length, device=q.device)
        seen = keys <= positions
        if window is not None:
            seen &= keys > positions - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[begin:end] = (weights @ v).transpose(0, 1).to(q.dtype)
    return out


def fake(
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
    lists = (block_table, sequence_lengths, query_starts)
    _check(q, k_cache, v_cache, *lists, scale, window, softcap, k_scale, v_scale)
    return torch.empty_like(q)


# --- Checks ---------------------------------------------------------------------------------------


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence_lengths: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    expect_float(NAME, "q", q)
    expect(q.dim() == 3, NAME, "q", f"shape {list(q.shape)}", "[tokens, heads, head size]")
    low, high = HEAD_SIZES
    expect(low <= q.shape[2] <= high, NAME, "q", f"heads of {q.shape[2]}", f"{low} to {high}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect(cache.dtype in (q.dtype, *FP8), NAME, name, cache.dtype, q.dtype)
        fits = cache.dim() == 4 and cache.shape[3] == q.shape[2]
        wanted = f"[blocks, block_size, kv_heads, {q.shape[2]}]"
        expect(fits, NAME, name, f"shape {list(cache.shape)}", wanted)
        kv_heads = cache.shape[2]
        fits = kv_heads > 0 and q.shape[1] % kv_heads == 0
        expect(fits, NAME, name, f"{kv_heads} heads", f"a divisor of q's {q.shape[1]} heads")
        expect(cache.shape[1] > 0, NAME, name, "blocks of 0", "1 or more")
    expect_shape(NAME, "v_cache", v_cache, k_cache.shape)
    expect(v_cache.dtype == k_cache.dtype, NAME, "v_cache", v_cache.dtype, k_cache.dtype)
    expect_scales(NAME, k_cache, k_scale, v_scale)
    wanted = "[sequences, max_blocks]"
    expect(block_table.dim() == 2, NAME, "block_table", f"shape {list(block_table.shape)}", wanted)
    sequences = block_table.shape[0]
    expect_shape(NAME, "sequence_lengths", sequence_lengths, (sequences,))
    expect_shape(NAME, "query_starts", query_starts, (sequences + 1,))
    integers = {
        "block_table": block_table,
        "sequence_lengths": sequence_lengths,
        "query_starts": query_starts,
    }
    for name, t in integers.items():
        expect(t.dtype is torch.int32, NAME, name, t.dtype, torch.int32)
    expect_together(NAME, q, k_cache=k_cache, v_cache=v_cache, **integers)
    expect(math.isfinite(scale), NAME, "scale", scale, "a finite number")
    expect(window is None or window >= 1, NAME, "window", window, "1 or more")
    fits = softcap is None or (math.isfinite(softcap) and softcap > 0)
    expect(fits, NAME, "softcap", softcap, "more than 0")


def check_values(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence_lengths: torch.Tensor,
    query_starts: torch.Tensor,
) -> None:
    """Raise OpError unless starts, lengths and blocks lead to memory that is there."""
    starts, tokens = query_starts.tolist(), q.shape[0]
    blocks, block_size = k_cache.shape[:2]
    told = f"from {starts[0]} to {starts[-1]}"
    fits = starts[0] == 0 and starts[-1] == tokens
    expect(fits, NAME, "query_starts", told, f"from 0 to q's {tokens} tokens")
    room = block_table.shape[1] * block_size
    for sequence, length in enumerate(sequence_lengths.tolist()):
        queries = starts[sequence + 1] - starts[sequence]
        where = f"for sequence {sequence}"
        expect(queries >= 0, NAME, "query_starts", f"falling values {where}", "rising values")
        wanted = f"its {queries} queries or more"
        expect(length >= queries, NAME, "sequence_lengths", f"{length} {where}", wanted)
        wanted = f"at most {room}, the blocks that block_table has for it"
        expect(length <= room, NAME, "sequence_lengths", f"{length} {where}", wanted)
        used = block_table[sequence, : -(-length // block_size)] if queries else block_table[:0]
        wrong = used[(used < 0) | (used >= blocks)]
        told = f"{wrong[:1].tolist()} {where}"
        expect(wrong.numel() == 0, NAME, "block_table", told, f"0 to {blocks - 1}")


# --- Tests and measures ---------------------------------------------------------------------------


def example(
    device: torch.device,
    dtype: torch.dtype,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    block_size: int = 16,
    distinct: int = 1 << 20,
) -> tuple[torch.Tensor, ...]:
    """Tensors for a call: sequences as (queries, keys), their blocks shuffled over the cache.

    What no key is in holds NaN, and entries of the table that no key needs are out of range. After
    `distinct` keys they repeat, which takes less time to make up.
    """
    generator = torch.Generator().manual_seed(len(sequences))
    needed = [-(-keys // block_size) for _, keys in sequences]
    blocks = sum(needed) + 2
    order = torch.randperm(blocks, generator=generator)
    table = torch.full((len(sequences), max([*needed, 0]) + 1), -7, dtype=torch.int32)
    cache = torch.full((2, blocks, block_size, heads[1], head_size), torch.nan, dtype=dtype)
    taken = 0
    for row, ((_, keys), count) in enumerate(zip(sequences, needed, strict=True)):
        own = order[taken : taken + count]
        table[row, :count] = own
        taken += count
        shape = (2, min(keys, distinct), heads[1], head_size)
        values = torch.randn(shape, generator=generator).to(dtype)
        at = torch.arange(keys)
        cache[:, own[at // block_size], at % block_size] = values[:, at % distinct]
    tokens = sum(queries for queries, _ in sequences)
    q = torch.randn(tokens, heads[0], head_size, generator=generator)
    starts = torch.tensor([0, *(queries for queries, _ in sequences)]).cumsum(0)
    lengths = torch.tensor([keys for _, keys in sequences])
    k_cache, v_cache = (half.clone().to(device) for half in cache)
    integers = (t.to(device, torch.int32) for t in (table, lengths, starts))
    return (q.to(device, dtype), k_cache, v_cache, *integers)


def fp8_example(
    device: torch.device, dtype: torch.dtype, kind: torch.dtype, *args: Any, **kwargs: Any
) -> tuple[Any, ...]:
    """As `example`, with caches of 8-bit floats, and a scale for all keys and one for each head."""
    q, k_cache, v_cache, *others = example(device, dtype, *args, **kwargs)
    k_scale = torch.tensor([0.4], device=device)
    v_scale = torch.linspace(0.2, 0.7, k_cache.shape[2]).to(device)
    caches = (
        as_cached(cache, torch.empty(0, dtype=kind), scale)
        for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
    )
    return (q, *caches, *others, k_scale, v_scale)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Decode, prefill and both; shared heads, odd head sizes, windows, caches side by side; fp8."""
    mixed = [(1, 37), (21, 21), (1, 1), (0, 9), (5, 70), (0, 0), (1, 16), (2, 33)]

    def made(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return example(device, dtype, *args, **kwargs)

    def small(kind: torch.dtype, *more: Any, **kwargs: Any) -> tuple[Any, ...]:
        *tensors, k_scale, v_scale = fp8_example(device, dtype, kind, mixed, **kwargs)
        return (*tensors, 0.2, *more, k_scale, v_scale)

    q, k_cache, v_cache, *others = made(mixed, (6, 2), 48)
    both = torch.stack([k_cache, v_cache], 2)
    return [
        (*made(mixed), 0.125),
        (q, both[:, :, 0], both[:, :, 1], *others, 0.2),
        (*made(mixed, (5, 1), 40, block_size=7), 0.2, 10),
        (*made([(70, 90), (1, 200)], (8, 8), 80), 0.1, 3, 20.0),
        (*made([(1, 1300), (3, 600)], (12, 1), 32), 0.3, None, 2.0),
        (*made([(1, 530)], (2, 2), 256, block_size=64), 0.0625, 600),
        (*made([(150, 150)], (3, 1), 104, block_size=1), 0.1),
        (*made([(1, 5), (150, 190), (90, 90)], (4, 1), 32), 0.2),
        (*made([]), 0.125),
        small(FP8[0], None, None, heads=(8, 4), head_size=64),
        small(FP8[1], 20, 5.0, heads=(3, 3), head_size=80, block_size=32),
        (q, k_cache.to(FP8[0]), v_cache.to(FP8[0]), *others, 0.2),
    ]


def refused(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    tensors = example(device, torch.float32, [(1, 20), (3, 3)])
    q, k, v, table, lengths, starts = tensors

    def call(scale: float = 0.1, *rest: Any, **changed: torch.Tensor) -> tuple[Any, ...]:
        named = {"q": q, "k": k, "v": v, "table": table, "lengths": lengths, "starts": starts}
        return (*(named | changed).values(), scale, *rest)

    outside = table.clone()
    outside[0, 1] = k.shape[0]
    small, one = k.to(FP8[0]), torch.ones(1, device=device)
    if device.type != "cpu":  # values that no GPU kernel's host looks at
        values: list[tuple[str, tuple[Any, ...]]] = []
    else:
        values = [
            ("query_starts: .*from 0 to q's 4", call(starts=starts + 1)),
            (
                "query_starts: .*fall",
                call(starts=starts.clone().index_fill(0, starts[1].long(), 9)),
            ),
            ("sequence_lengths: got 2 .*3 queries", call(lengths=lengths - 1)),
            ("sequence_lengths: got 900 .*at most", call(lengths=lengths * 0 + 900)),
            ("block_table: got .*0 to", call(table=outside)),
            ("block_table: got .*-1.*0 to", call(table=table * 0 - 1)),
        ]
    return [
        *values,
        ("v_cache: got torch.float32, expected torch.float8_e4m3fn", call(k=small)),
        ("k_scale: got .*only fp8 is scaled", call(0.1, None, None, one)),
        ("k_scale: got torch.float16", call(0.1, None, None, one.half(), k=small, v=small)),
        (r"v_scale: got shape \[3\]", call(0.1, None, None, None, one.repeat(3), k=small, v=small)),
        ("q: got torch.int64", call(q=q.long())),
        ("q: got shape", call(q=q[0])),
        ("q: got .*16 to 512", call(q=q[..., :8].contiguous())),
        ("k_cache: got torch.float16, expected torch.float32", call(k=k.half())),
        ("v_cache: got torch.bfloat16, expected torch.float32", call(v=v.bfloat16())),
        (r"k_cache: got shape .* expected \[blocks", call(k=k[..., :32])),
        ("k_cache: got .*divisor of q's 3 heads", call(q=q[:, :3].contiguous())),
        (r"v_cache: got shape", call(v=v[:2])),
        ("block_table: got torch.int64", call(table=table.long())),
        ("sequence_lengths: got torch.float32", call(lengths=lengths.float())),
        ("sequence_lengths: got shape", call(lengths=lengths[:1])),
        ("query_starts: got shape", call(starts=starts[:2])),
        ("scale: got nan", call(float("nan"))),
        ("window: got 0", call(0.1, 0)),
        ("softcap: got 0", call(0.1, None, 0.0)),
    ]


def floor(
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
) -> Floor:
    keys = pairs = 0
    for length, queries in zip(
        sequence_lengths.tolist(), query_starts.diff().tolist(), strict=True
    ):
        if queries == 0:
            continue
        most = length if window is None else min(window, length)
        keys += min(length, most + queries - 1)
        pairs += sum(min(most, length - i) for i in range(queries))
    kv_bytes = 2 * keys * k_cache.shape[2] * k_cache.shape[3] * k_cache.element_size()
    return Floor(kv_bytes + q.nbytes, q.nbytes, 4 * pairs * q.shape[1] * q.shape[2])


def benchmarks(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """Decode and prefill of a model with 8 key-value heads of 128."""
    rows = []
    for label, sequences, heads, dtype in (
        ("decode 8x2048, heads 32/8", [(1, 2048)] * 8, (32, 8), torch.bfloat16),
        ("decode 8x2048, heads 32/8", [(1, 2048)] * 8, (32, 8), torch.float32),
        ("decode 8x2048, heads 8/8", [(1, 2048)] * 8, (8, 8), torch.bfloat16),
        ("decode 1x16384, heads 32/8", [(1, 16384)], (32, 8), torch.bfloat16),
        ("prefill 1024, heads 32/8", [(1024, 1024)], (32, 8), torch.bfloat16),
        ("prefill 1024, heads 32/8", [(1024, 1024)], (32, 8), torch.float32),
        ("prefill 256 behind 1024", [(256, 1280)], (32, 8), torch.bfloat16),
    ):
        tensors = example(device, dtype, sequences, heads, 128, distinct=64)
        rows.append((f"{label} {str(dtype)[6:]}", (*tensors, 128**-0.5)))
    return rows


OPS = (
    Op(
        name=NAME,
        schema="(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
        "Tensor sequence_lengths, Tensor query_starts, float scale, int? window=None, "
        "float? softcap=None, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
        reference=reference,
        fake=fake,
        dtypes=FLOATS,
        tolerance=CLASS,
        cases=cases,
        refused=refused,
        floor=floor,
        benchmarks=benchmarks,
    ),
)
