"""Timers by name, on the clock of the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from deepspeed._names import names_of
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import print_dist
from ds_core.errors import DsError


class _Timer:
    """Stretches of time between `start` and `stop`, in milliseconds."""

    def __init__(self, name: str) -> None:
        self.name_ = name
        self.started_ = False
        self._begin: Any = None
        self._stretches: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Begin a stretch."""
        if self.started_:
            raise DsError(f"timer {self.name_!r}: start: it runs already; stop it first")
        self._begin, self.started_ = _now(), True

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """End it. reset: forget the earlier ones; record makes no difference."""
        if not self.started_:
            raise DsError(f"timer {self.name_!r}: stop: it does not run; start it first")
        if reset:
            self._stretches.clear()
        self._stretches.append((self._begin, _now()))
        self.started_ = False

    def reset(self) -> None:
        """Forget everything."""
        self.started_ = False
        self._stretches.clear()

    def elapsed(self, reset: bool = True) -> float:
        """All stretches together, in milliseconds; one that runs goes on."""
        runs = self.started_
        if runs:
            self.stop()
        total = sum(self._milliseconds())
        if reset:
            self._stretches.clear()
        if runs:
            self.start()
        return total

    def mean(self) -> float:
        """The mean of the stretches, in milliseconds; 0 without any."""
        found = self._milliseconds()
        return sum(found) / len(found) if found else 0.0

    def _milliseconds(self) -> list[float]:
        get_accelerator().synchronize()
        return [_between(begin, end) for begin, end in self._stretches]


def _now() -> Any:
    event = get_accelerator().core.event(timed=True)
    if event is None:
        return time.perf_counter()
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin) * 1e3
    return float(begin.elapsed_time(end))


class SynchronizedWallClockTimer:
    """Timers by name: `timers("forward").start()`."""

    def __init__(self) -> None:
        self.timers: dict[str, _Timer] = {}

    def __call__(self, name: str) -> _Timer:
        return self.timers.setdefault(name, _Timer(name))

    def get_timers(self) -> dict[str, _Timer]:
        """All of them."""
        return self.timers

    def log(
        self,
        names: Sequence[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Write the milliseconds of some timers, divided by `normalizer`, on rank 0."""
        told = [
            f"{name}: {self.timers[name].elapsed(reset) / normalizer:.2f}"
            for name in names
            if name in self.timers
        ]
        print_dist(" | ".join(["time (ms)", *told]), ranks=ranks or [0])

    def get_mean(
        self, names: Sequence[str], normalizer: float = 1.0, reset: bool = True
    ) -> dict[str, float]:
        """The mean stretch of some timers in milliseconds, divided by `normalizer`."""
        found = {}
        for name in names:
            if name in self.timers:
                found[name] = self.timers[name].mean() / normalizer
                if reset:
                    self.timers[name].reset()
        return found


_OBSERVERS = (
    'the engine tells it: "wall_clock_breakdown" and "steps_per_print" in the config, or '
    "ds_core.observers.Throughput"
)

__getattr__, __dir__ = names_of(
    __name__,
    {},
    missing=dict.fromkeys(("ThroughputTimer", "NoopTimer", "CudaEventTimer"), _OBSERVERS),
)
