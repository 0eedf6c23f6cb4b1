"""What this machine can do at best, measured in the process and the run that is compared with it.

A floor is a callable, to be put among the candidates of `timing.interleave`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from ds_core.errors import OpError
from ds_ops.bench.timing import interleave
from ds_ops.native import library

Floor = Callable[[], object]

#: How the streams may be walked: bytes of the longest at a time, and whether stores go past the
#: caches. Which is the fastest depends on the machine and on the sizes.
_WALKS = ((512, False), (1024, False), (4096, False), (512, True), (1024, True), (4096, True))
_MAX_STREAMS = 16


def stream_floor(reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> Floor:
    """A call that reads some tensors and writes others, as fast as this machine can.

    Use it for kernels that are bound by memory: with tensors of the sizes that the kernel reads
    and writes, and the same tensor in both lists where it works in place. Of several ways to walk
    the memory, the fastest is found first. Threads: `torch.get_num_threads()` at each call.

    Args:
        reads, writes: contiguous CPU tensors, 16 of each at most. What is written is overwritten
            with arbitrary bits: give copies.
    """
    streams = [*reads, *writes]
    for t in streams:
        if t.device.type != "cpu" or not t.is_contiguous():
            raise OpError(
                f"stream_floor: got a tensor on {t.device} of strides {t.stride()}, "
                "expected contiguous ones on the CPU"
            )
    if max(len(reads), len(writes)) > _MAX_STREAMS:
        raise OpError(
            f"stream_floor: got {len(reads)} and {len(writes)} tensors, expected at "
            f"most {_MAX_STREAMS} of each"
        )
    walks = {str(walk): _walk(streams, len(reads), *walk) for walk in _WALKS[: 6 if writes else 3]}
    found = interleave(walks, seconds=0.1, min_rounds=5)
    return walks[min(found, key=lambda name: found[name].min_s)]


def read_floor(*tensors: torch.Tensor) -> Floor:
    """A call that reads tensors once, and writes nothing: the floor of a matrix times a vector."""
    return stream_floor(tensors, ())


def read_floors(tensors: Sequence[torch.Tensor]) -> list[Floor]:
    """A `read_floor` of each of many alike tensors, walked as is fastest for the first of them."""
    walks = [[_walk([t], 1, *walk) for walk in _WALKS[:3]] for t in tensors]
    found = interleave({str(i): walk for i, walk in enumerate(walks[0])}, seconds=0.1, min_rounds=5)
    best = int(min(found, key=lambda index: found[index].min_s))
    return [each[best] for each in walks]


def _walk(
    streams: Sequence[torch.Tensor], num_reads: int, step_bytes: int, past_caches: bool
) -> Floor:
    function = library.load().ds_ops_stream
    function.restype = ctypes.c_uint32
    addresses = (ctypes.c_uint64 * len(streams))(*(t.data_ptr() for t in streams))
    sizes = (ctypes.c_int64 * len(streams))(*(t.nbytes for t in streams))
    step = ctypes.c_int64(step_bytes)

    def floor(alive: Sequence[torch.Tensor] = tuple(streams)) -> object:
        return function(addresses, sizes, num_reads, len(alive) - num_reads, step, int(past_caches))

    return floor


def matmul_floor(m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> Floor:
    """A call of `torch.mm` of `[m, k]` and `[k, n]`: the floor of what is bound by arithmetic."""
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    out = torch.empty(m, n, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def peak_flops(dtype: torch.dtype = torch.float32, *, seconds: float = 0.5) -> float:
    """FLOPs per second that `torch.mm` reaches at a size that suits it, measured now."""
    size = 1024
    found = interleave({"mm": matmul_floor(size, size, size, dtype)}, seconds=seconds)
    return 2 * size**3 / found["mm"].min_s
