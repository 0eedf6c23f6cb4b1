"""How long collectives take by message size: what `ds bench comm` measures.

Sizes and bandwidths are those of NCCL's own benchmarks, as `ds_core.comm.traffic` explains.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ds_core.accelerator import Accelerator
from ds_core.comm.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from ds_core.comm.group import Group
from ds_core.comm.point_to_point import exchange
from ds_core.comm.rooted import broadcast
from ds_core.comm.traffic import bus_factor
from ds_core.errors import CommError

#: What can be measured, in the order in which it is.
OPERATIONS = (
    *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "exchange"),
)


@dataclass(frozen=True)
class Measured:
    """One operation at one size, the slowest rank's times.

    Attributes:
        op: operation; "exchange" is a message around the ring of ranks.
        message_bytes: the tensor of an all-reduce or broadcast, the gathered or unreduced one of
            the others.
        median_s, fastest_s: of the trials.
        algorithm_bandwidth: bytes of message per second, by the median.
        bus_bandwidth: bytes per second that each rank's link carries at least.
    """

    op: str
    message_bytes: int
    median_s: float
    fastest_s: float
    algorithm_bandwidth: float
    bus_bandwidth: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def sizes_up_to(most: int, least: int = 1) -> list[int]:
    """Powers of 4 times `least` up to `most`, and `most` itself."""
    found = []
    size = least
    while size < most:
        found.append(size)
        size *= 4
    return [*found, most]


def measure(
    group: Group,
    operations: Sequence[str],
    elements: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    trials: int = 5,
    warm_ups: int = 2,
    is_async: bool = False,
) -> Iterator[Measured]:
    """Measure each operation at each size. Collective over `group`.

    Args:
        group: the ranks.
        operations: some of `OPERATIONS`.
        elements: of whole messages; rounded up to a multiple of the ranks.
        dtype: of the tensors.
        device: of the tensors; default: what the group's backend works on.
        trials: times that each is measured.
        warm_ups: times before that.
        is_async: start all trials before the first is waited for; its time is then their mean.

    Raises CommError for an operation that cannot be measured.
    """
    unknown = [name for name in operations if name not in OPERATIONS]
    if unknown:
        raise CommError(f"op: got {unknown[0]!r}, expected some of {', '.join(OPERATIONS)}")
    place = group.control_device() if device is None else device
    for op in operations:
        for wanted in elements:
            whole = -(-wanted // group.size) * group.size
            start = _prepared(op, group, whole, dtype, place)
            times = _times(start, place, trials, warm_ups, is_async)
            slowest = torch.tensor(times, dtype=torch.float64, device=group.control_device())
            all_reduce(slowest, group, op="max", caller="ds bench comm: times")
            taken = slowest.tolist()
            median, size = statistics.median(taken), whole * dtype.itemsize
            rate = size / median
            yield Measured(op, size, median, min(taken), rate, rate * bus_factor(op, group.size))


def _prepared(
    op: str, group: Group, whole: int, dtype: torch.dtype, device: torch.device
) -> Callable[..., Any]:
    """What does the operation once, with `async_op` to come."""
    full = torch.zeros(whole, dtype=dtype, device=device)
    out = torch.empty_like(full)
    part = full[: whole // group.size].clone()
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    chosen: dict[str, Callable[..., Any]] = {
        "all_reduce": functools.partial(all_reduce, full, group),
        "all_gather": functools.partial(all_gather, out, part, group),
        "reduce_scatter": functools.partial(reduce_scatter, part, full, group),
        "all_to_all": functools.partial(all_to_all, out, full, group),
        "broadcast": functools.partial(broadcast, full, group),
        "exchange": functools.partial(exchange, [(full, after)], [(out, before)], group),
    }
    if op == "exchange" and group.size == 1:
        raise CommError("op: exchange needs at least two ranks; leave it out")
    return functools.partial(chosen[op], caller="ds bench comm")


def _times(
    start: Callable[..., Any], device: torch.device, trials: int, warm_ups: int, is_async: bool
) -> list[float]:
    """Seconds of each trial, on the clock of this rank."""
    synchronize = Accelerator(device.type).synchronize
    for _ in range(warm_ups):
        start()
    synchronize()
    found = []
    if is_async:
        began = time.perf_counter()
        for handle in [start(async_op=True) for _ in range(trials)]:
            handle.wait()
        synchronize()
        return [(time.perf_counter() - began) / trials] * trials
    for _ in range(trials):
        began = time.perf_counter()
        start()
        synchronize()
        found.append(time.perf_counter() - began)
    return found
