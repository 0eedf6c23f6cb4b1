"""Benchmarks of quantization, sign packing and the shared-memory all-reduce.

Peers are the same steps in plain torch, where these are few; of the all-reduce it is gloo.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_core import ops
from ds_core.seams import Op
from ds_core.testing import run_ranks
from ds_ops.bench import timing
from ds_ops.bench.floors import stream_floor
from ds_ops.shared_memory import SharedMemoryAllReduce

_OPS = (
    "quantize_blocks",
    "quantize_feedback_",
    "dequantize_blocks",
    "quantized_reduce",
    "quantized_reduce_feedback_",
    "fake_quantize",
    "fake_quantize_signs",
    "sign_pack",
    "sign_pack_feedback_",
    "sign_unpack",
)
_CPU = torch.device("cpu")
_FP8 = {2: torch.float8_e4m3fn, 3: torch.float8_e5m2}
#: Of a message, in bytes.
_MESSAGES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 24)


def rows(seconds: float) -> Iterator[timing.Row]:
    """Every op of the family, then the all-reduce of two processes with one thread each."""
    for name in _OPS:
        op = ops.get(name)
        for label, args in op.benchmarks(_CPU):
            yield _row(op, label, args, seconds)
    yield from _all_reduces()


def _row(op: Op, label: str, args: tuple[Any, ...], seconds: float) -> timing.Row:
    bytes_ = op.floor(*args)
    floor = stream_floor([_bytes(bytes_.read_bytes)], [_bytes(bytes_.written_bytes)])
    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.run(op.name, *args),
        "floor": floor,
    }
    peer = _peer(op.name, args)
    if peer is not None:
        candidates["plain torch"] = peer
    size, dtype, *rest = label.split(" ", 2)
    return timing.row(
        op.name,
        " ".join([size, *rest]),
        dtype,
        timing.interleave(candidates, seconds=seconds),
        peer="plain torch" if peer is not None else "",
        error=_error(op.name, args),
    )


def _bytes(count: int) -> torch.Tensor:
    return torch.ones(max(count, 64), dtype=torch.uint8)


# --- Plain torch ----------------------------------------------------------------------------------


def _peer(name: str, args: tuple[Any, ...]) -> Callable[[], object] | None:
    """The same in torch's own operations; None where bits would have to be packed one by one."""
    if name == "quantize_blocks":
        x, number, block, symmetric, seed, *_ = args
        if symmetric and seed is None and number in (0, 1, 2, 3):
            return lambda: _torch_quantize(x, number, block)
    if name == "dequantize_blocks":
        codes, scales, _, number, block, dtype, _ = args
        if number in (0, 1, 2, 3):
            return lambda: _torch_dequantize(codes, scales, number, block).to(dtype)
    if name == "quantized_reduce":
        codes, scales, _, number, block, *_ = args
        return lambda: _torch_quantize(
            _torch_dequantize(codes, scales, number, block).mean(0), number, block
        )
    if name == "fake_quantize":
        x, _, bits, groups, symmetric, seed = args
        if symmetric and seed is None:
            return lambda: _torch_fake_quantize(x, bits, groups)
    if name == "sign_pack":
        return lambda: _torch_sign_pack(args[0])
    if name == "sign_pack_feedback_":
        x, error, chunk, _ = args
        return lambda: _torch_sign_feedback(x, error, chunk or x.numel())
    return None


def _torch_quantize(x: torch.Tensor, number: int, block: int) -> object:
    rows = x.reshape(-1, block).float()
    largest = torch.finfo(_FP8[number]).max if number in _FP8 else (127.0, 7.0)[number]
    scale = rows.abs().amax(1, keepdim=True) / largest
    scaled = rows / scale
    if number in _FP8:
        return scaled.to(_FP8[number]), scale
    codes = scaled.round().to(torch.int8)
    if number == 1:
        pairs = codes.view(torch.uint8)
        return (pairs[:, ::2] & 15) | (pairs[:, 1::2] << 4), scale
    return codes, scale


def _torch_dequantize(
    codes: torch.Tensor, scales: torch.Tensor, number: int, block: int
) -> torch.Tensor:
    if number in _FP8:
        numbers = codes.view(_FP8[number]).float()
    elif number == 1:
        pairs = torch.stack((codes & 15, codes >> 4), -1).view(torch.int8)
        numbers = ((pairs ^ 8) - 8).float().flatten(-2)
    else:
        numbers = codes.view(torch.int8).float()
    lead = numbers.shape[:-1]
    return (numbers.view(*lead, -1, block) * scales.unsqueeze(-1)).view(*lead, -1)


def _torch_fake_quantize(x: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    rows = x.view(groups, -1).float()
    most = (1 << (bits - 1)) - 1
    scale = rows.abs().amax(1) / most
    zeros = torch.zeros(groups, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(rows, scale, zeros, 0, -most, most).to(x.dtype)


def _torch_sign_pack(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bits = (x >= 0).view(-1, 8).to(torch.uint8)
    packed = bits[:, 0].clone()
    for place in range(1, 8):
        packed |= bits[:, place] << place
    return packed, x.abs().mean()


def _torch_sign_feedback(x: torch.Tensor, error: torch.Tensor, chunk: int) -> object:
    error += x
    scale = error.view(-1, chunk).square().mean(1, keepdim=True).sqrt()
    packed = _torch_sign_pack(error)
    error.view(-1, chunk).sub_(torch.where(error.view(-1, chunk) >= 0, scale, -scale))
    return packed


def _error(name: str, args: tuple[Any, ...]) -> float | None:
    """What quantizing loses: ||dequantized - x|| / ||x||; None where nothing is lost."""
    if name != "quantize_blocks":
        return None
    x, number, block, symmetric, *_ = args
    codes, scales, zeros = ops.run(name, *args)
    given = None if symmetric else zeros
    back = ops.run("dequantize_blocks", codes, scales, given, number, block, torch.float32, False)
    return float((back - x.float()).norm() / x.float().norm())


# --- All-reduce -----------------------------------------------------------------------------------


def _all_reduces() -> Iterator[timing.Row]:
    for size, ours, gloo, floor in run_ranks(2, _measure, _MESSAGES)[0]:
        yield timing.Row(
            "shared-memory all-reduce",
            f"{size >> 10} KiB, 2 ranks",
            "fp32",
            ours,
            floor_ms=floor,
            peer="gloo",
            peer_ms=gloo,
            threads=1,
            note="floor: read and write the message twice",
        )


def _measure(sizes: Sequence[int]) -> list[tuple[int, float, float, float]]:
    """(bytes, ms of ours, gloo and the floor), each the best of several runs side by side."""
    found = []
    world = dist.group.WORLD
    assert world is not None
    with SharedMemoryAllReduce(world) as reducer:
        for size in sizes:
            x = torch.zeros(size // 4)
            spare = torch.zeros(size // 4)
            floor = stream_floor([x, spare], [x, spare])
            calls = (
                lambda x=x: reducer.all_reduce_(x),
                lambda x=x: dist.all_reduce(x),
                floor,
            )
            repeats = max(1, min(200, (1 << 22) // size))
            best = [float("inf")] * len(calls)
            for _ in range(12):
                for index, call in enumerate(calls):
                    reducer.all_reduce_(spare)  # both begin at once
                    begin = time.perf_counter()
                    for _ in range(repeats):
                        call()
                    best[index] = min(best[index], (time.perf_counter() - begin) / repeats * 1e3)
            found.append((size, best[0], best[1], best[2]))
    return found


if __name__ == "__main__":
    timing.main(rows)
