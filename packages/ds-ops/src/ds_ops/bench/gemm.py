"""Linear layers on quantized weights, and grouped products, beside torch's.

    python -m ds_ops.bench.gemm

Weights are read once per call, as a decoder does for each token: every candidate walks through
copies that together are far larger than the caches.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ds_core.ops.checking import relative
from ds_core.ops.grouped_mm import grouped_mm
from ds_core.ops.grouped_mm import reference as grouped_mm_reference
from ds_core.ops.quantized_weight import QuantizedWeight, quantize_weight, room
from ds_core.ops.weight_only_linear import weight_only_linear
from ds_ops.bench.floors import read_floor, read_floors
from ds_ops.bench.timing import Row, interleave, main, row

#: Outputs and inputs of the layers of a model of 7 billion parameters.
_LAYERS = ((4096, 4096), (11008, 4096), (4096, 11008))
_GROUP = 128
#: What an interleaved run reads before it comes back to the same weight, in sizes of the last
#: cache.
_CACHES = 4


def rows(seconds: float) -> Iterator[Row]:
    """All rows, each measured for about that many seconds, with one thread and with all."""
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, os.cpu_count() or 1}):
            torch.set_num_threads(threads)
            for out, depth in _LAYERS:
                yield from _layer("int8", out, depth, 1, seconds)
                yield from _layer("int4", out, depth, 1, seconds)
            yield from _layer("fp8_e4m3", *_LAYERS[0], 1, seconds)
            yield from _layer("fp6_e3m2", *_LAYERS[0], 1, seconds)
            for num_rows in (8, 64):
                yield from _layer("int8", *_LAYERS[0], num_rows, seconds)
                yield from _layer("int4", *_LAYERS[0], num_rows, seconds)
            for shape in ((8, 2048, 512, 1024), (32, 64, 1024, 1024)):
                for dtype in (torch.float32, torch.bfloat16):
                    yield _grouped(*shape, dtype, seconds)
    finally:
        torch.set_num_threads(before)


# --- Quantized weights ----------------------------------------------------------------------------


def _layer(format: str, out: int, depth: int, num_rows: int, seconds: float) -> Iterator[Row]:
    """One row per peer, all from one interleaved run."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(out, depth, generator=generator) / depth**0.5
    weight = quantize_weight(dense, format, group=_GROUP)
    x = torch.randn(num_rows, depth, generator=generator)
    peers = _peers(format, dense, x)
    count = _CACHES * _last_cache_bytes() // (weight.codes.nbytes * (1 + len(peers))) + 2
    copies = [_copy(weight) for _ in range(count)]
    # The floor is half a round behind, so that it finds nothing that the kernel left in the cache.
    floors = read_floors([c.codes for c in (*copies[count // 2 :], *copies[: count // 2])])
    half = x.bfloat16()
    candidates = {
        "ours": _in_turn([partial(weight_only_linear, half, copy) for copy in copies]),
        "floor": _in_turn(floors),
        **{name: _in_turn([make() for _ in range(count)]) for name, make in peers.items()},
    }
    timings = interleave(candidates, seconds=seconds)
    truth = half.double() @ weight.dequantize(torch.float64).t()
    error = relative(weight_only_linear(half, weight), truth)
    for name in peers or ("",):
        yield row(
            f"weight_only_linear {format}",
            f"{num_rows}x{depth}x{out}",
            torch.bfloat16,
            timings,
            peer=name,
            error=error,
            max_x_floor=1 / 0.7 if num_rows == 1 and format.startswith("int") else None,
            min_x_peer=1.2 if num_rows == 1 and name in _TARGETS else None,
        )


#: Peers that are to be outrun by a fifth.
_TARGETS = ("linear_dynamic", "_weight_int4pack_mm")


def _peers(format: str, dense: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """By name, what makes a call of the peer with a packed weight of its own."""
    out, depth = dense.shape
    half = x.bfloat16()
    if format == "int8":
        codes = torch.randint(-127, 128, (out, depth), dtype=torch.int8)
        scales = torch.rand(out).bfloat16()

        def packed() -> Callable[[], object]:
            return partial(torch._weight_int8pack_mm, half, codes.clone(), scales)

        def dynamic() -> Callable[[], object]:
            quantized = torch._make_per_tensor_quantized_tensor(codes, 0.02, 0)
            own = torch.ops.quantized.linear_prepack(quantized, None)
            return partial(torch.ops.quantized.linear_dynamic, x, own, True)

        return {"linear_dynamic": dynamic, "_weight_int8pack_mm": packed}
    if format == "int4":
        nibbles = torch.randint(0, 16, (out, depth), dtype=torch.int32)
        groups = torch.rand(depth // _GROUP, out, 2).bfloat16()
        own = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        call = torch.ops.aten._weight_int4pack_mm_for_cpu
        return {"_weight_int4pack_mm": lambda: partial(call, half, own.clone(), _GROUP, groups)}
    return {"F.linear bf16": lambda: partial(functional.linear, half, dense.bfloat16())}


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    codes = room(weight.codes.shape, weight.codes.dtype, weight.codes.device)
    return QuantizedWeight(
        codes.copy_(weight.codes),
        weight.scales.clone(),
        weight.zeros,
        weight.shape,
        weight.format,
        weight.group,
    )


def _last_cache_bytes() -> int:
    """Of the largest cache of a processor; 32 MiB where Linux does not say."""
    found = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text.endswith("K"):
            found.append(int(text[:-1]) << 10)
    return max(found)


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call of the next one each time."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


# --- Grouped products -----------------------------------------------------------------------------


def _grouped(experts: int, tokens: int, k: int, n: int, dtype: torch.dtype, seconds: float) -> Row:
    a, b = torch.randn(tokens, k).to(dtype), torch.randn(experts, k, n).to(dtype)
    step = tokens // experts
    offsets = torch.arange(step, tokens + 1, step, dtype=torch.int32)
    timings = interleave(
        {
            "ours": lambda: grouped_mm(a, b, offsets),
            "floor": read_floor(a, b),
            "F.grouped_mm": lambda: functional.grouped_mm(a, b, offs=offsets),
        },
        seconds=seconds,
    )
    error = relative(
        grouped_mm(a, b, offsets), grouped_mm_reference(a.double(), b.double(), offsets)
    )
    shape = f"{tokens}x{k}x{n}/{experts}"
    note = "the floor counts memory only"
    return row("grouped_mm", shape, dtype, timings, peer="F.grouped_mm", error=error, note=note)


if __name__ == "__main__":
    main(rows)
