"""One clock for all ranks."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ds_core import comm

#: Barriers after which every rank reads its clock.
ROUNDS = 9
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Clock:
    """Turns this rank's `time.perf_counter_ns` into microseconds that mean the same on all ranks.

    Attributes:
        offset_ns: what this rank's clock lacks to rank 0's.
        origin_ns: time 0, on rank 0's clock.
    """

    offset_ns: int = 0
    origin_ns: int = 0

    def us(self, local_ns: float) -> float:
        """Microseconds since the origin."""
        return (local_ns + self.offset_ns - self.origin_ns) / 1e3


def aligned_clock(
    group: comm.Group,
    *,
    now: Callable[[], int] = time.perf_counter_ns,
    machine: str | None = None,
) -> Clock:
    """This rank's clock against that of the group's rank 0. Collective over `group`.

    Processes of one machine share its clock, so they agree exactly. Between machines the offset is
    the median, over some barriers and the ranks of a machine, of how far the clocks stand apart as
    ranks leave a barrier; it is as good as ranks leave it together (about a message's latency).
    """
    readings = []
    for _ in range(ROUNDS):
        comm.barrier(group, caller="trace clock")
        readings.append(now())
    mine = (machine or _machine(), readings)
    everyone = comm.all_gather_object(mine, group, caller="trace clock")
    home, reference = everyone[0]
    origin = reference[0]
    if mine[0] == home:
        return Clock(0, origin)
    neighbours = [theirs for name, theirs in everyone if name == mine[0]]
    apart = [a - b for theirs in neighbours for a, b in zip(reference, theirs, strict=True)]
    return Clock(round(statistics.median(apart)), origin)


def _machine() -> str:
    """Different on machines whose clocks differ: a boot has one monotonic clock."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return platform.node()
