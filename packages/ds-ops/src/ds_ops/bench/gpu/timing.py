"""Measuring on a GPU, and what that GPU can do at best, in the process that is compared with it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ds_ops.bench.timing import Timing, timing_of

#: Written before each call: more than the second-level cache of any GPU, so that none starts warm.
_FLUSHED_BYTES = 512 << 20
#: Of a copy whose bandwidth is measured: far more than the cache holds.
_COPIED_BYTES = 1 << 30
_SIDE = 8192


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.5,
    min_rounds: int = 10,
) -> dict[str, Timing]:
    """How long each candidate takes on the current GPU, called in turn, from cold caches.

    A large write in front of each call keeps the GPU busy while the call is being launched, so that
    what the launch costs the processor does not count.
    """
    room = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    for call in candidates.values():
        call()  # which may compile
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while order and (rounds < min_rounds or time.perf_counter() < deadline):
        for name in order:
            samples[name].append(_seconds(candidates[name], room))
        order.append(order.pop(0))
        rounds += 1
    return {name: timing_of(found) for name, found in samples.items()}


def _seconds(call: Callable[[], object], room: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    room.zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Ceilings:
    """The best that was seen of a GPU.

    Attributes:
        name: of the device.
        bytes_per_s: read and written together, by a copy.
        flops_per_s: of a product of matrices, by the dtype of the factors.
    """

    name: str
    bytes_per_s: float
    flops_per_s: Mapping[torch.dtype, float]

    def floor_ms(self, moved_bytes: int, flops: int, dtype: torch.dtype) -> float:
        """The least time for that much of each; products of other dtypes count as fp32's."""
        peak = self.flops_per_s.get(dtype, self.flops_per_s[torch.float32])
        return max(moved_bytes / self.bytes_per_s, flops / peak) * 1e3


def ceilings() -> Ceilings:
    """Measured on the current GPU, in a few seconds."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = interleave({"copy": lambda: target.copy_(source)})["copy"].min_s
    rates = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.randn(_SIDE, _SIDE, dtype=dtype, device="cuda") for _ in range(2))
        product = interleave({"mm": functools.partial(torch.mm, a, b)})["mm"].min_s
        rates[dtype] = 2 * _SIDE**3 / product
    return Ceilings(torch.cuda.get_device_name(), 2 * _COPIED_BYTES / copied, rates)
