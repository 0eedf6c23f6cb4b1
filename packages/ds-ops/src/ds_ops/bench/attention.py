"""Paged attention beside torch's SDPA on the same keys and values, gathered per sequence.

Floors: decode reads each key and value once; prefill multiplies at the fp32 rate of `torch.mm`.
Two peers: SDPA on caches that are gathered in the call, and on dense ones that lie ready.

    python -m ds_ops.bench.attention --threads 2
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ds_core import ops
from ds_core.ops import kv_cache, paged_attention
from ds_core.ops.checking import relative
from ds_ops.bench.floors import peak_flops, read_floor, stream_floor
from ds_ops.bench.timing import Row, interleave, main, row

#: A sequence's keys and values as SDPA takes them.
Dense = list[tuple[torch.Tensor, torch.Tensor]]

_CPU = torch.device("cpu")
#: Keys and values are read within this multiple of the floor by the first decode.
_MAX_X_FLOOR = 1.3


def rows(seconds: float) -> Iterator[Row]:
    """Decode and prefill at the sizes of a model with 8 key-value heads, and cache writes."""
    for index, (label, args) in enumerate(paged_attention.benchmarks(_CPU)):
        shape, _, dtype = label.rpartition(" ")
        yield from _attention(shape, dtype, args, seconds, _MAX_X_FLOOR if index == 0 else None)
    for label, args in kv_cache.benchmarks(_CPU):
        yield _write(label, args, seconds)


def _attention(
    shape: str, dtype: str, args: tuple[Any, ...], seconds: float, max_x_floor: float | None
) -> Iterator[Row]:
    floor = paged_attention.floor(*args)
    ready = gathered(args)
    peers = {"SDPA": lambda: dense(args, ready), "gather + SDPA": lambda: dense(args)}
    candidates = {
        "ours": lambda: ops.run("paged_attention", *args),
        "floor": read_floor(torch.ones(floor.read_bytes // 4)),
        **peers,
    }
    found = interleave(candidates, seconds=seconds)
    arithmetic_ms = floor.flops / peak_flops(seconds=seconds / 4) * 1e3
    floor_ms = max(found.pop("floor").ms, arithmetic_ms)
    error = relative(ops.run("paged_attention", *args), _truth(args))
    for peer in peers:
        yield row(
            "paged_attention",
            shape,
            dtype,
            found,
            peer=peer,
            floor_ms=floor_ms,
            error=error,
            max_x_floor=max_x_floor,
        )


def _write(shape: str, args: tuple[Any, ...], seconds: float) -> Row:
    k, v, k_cache, v_cache, slots = args
    block_size = k_cache.shape[1]
    other_k, other_v = k_cache.clone(), v_cache.clone()

    def plain() -> None:
        other_k[slots // block_size, slots % block_size] = k
        other_v[slots // block_size, slots % block_size] = v

    candidates = {
        "ours": lambda: ops.run("write_kv_cache_", *args),
        "floor": stream_floor([k, v], [torch.empty_like(k), torch.empty_like(v)]),
        "index_put": plain,
    }
    found = interleave(candidates, seconds=seconds)
    return row("write_kv_cache_", shape, k.dtype, found, peer="index_put")


def gathered(args: tuple[Any, ...]) -> Dense:
    """The keys and values of each sequence, `[1, kv_heads, length, d]`."""
    _, k_cache, v_cache, table, lengths, *_ = args
    found = []
    for blocks, length in zip(table, lengths.tolist(), strict=True):
        used = blocks[: -(-length // k_cache.shape[1])].long()
        k, v = (
            cache[used].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (k_cache, v_cache)
        )
        found.append((k, v))
    return found


def dense(args: tuple[Any, ...], ready: Dense | None = None) -> torch.Tensor:
    """What `paged_attention` computes, by SDPA for each sequence."""
    q, starts, scale = args[0], args[5].tolist(), args[6]
    found = []
    for index, (k, v) in enumerate(gathered(args) if ready is None else ready):
        own = q[starts[index] : starts[index + 1]].transpose(0, 1)[None]
        queries, keys = own.shape[2], k.shape[2]
        mask = None
        if 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        out = torch.nn.functional.scaled_dot_product_attention(
            own,
            k,
            v,
            attn_mask=mask,
            is_causal=queries == keys,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


def _truth(args: tuple[Any, ...]) -> torch.Tensor:
    q, k_cache, v_cache, *others = args
    return dense((q.double(), k_cache.double(), v_cache.double(), *others))


if __name__ == "__main__":
    main(rows)
