"""torch's profiler (Kineto): what it recorded, as slices on our lanes."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ds_core.tracing.lanes import Slice

_MARK = "ds_core.clock"
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
#: Ranges that only enclose operations, or stand for communication, which has lanes of its own.
_NOT_COMPUTE = re.compile(
    r"autograd::|c10d::|gloo:|nccl:|mpi:|record_param_comms|ds_core\.|[A-Za-z]+Backward\d*$"
)
_KERNEL_LANES = ((r"gather", "gather"), (r"reduce", "reduce"), (r"", "other"))


class TorchOps:
    """Records every operation from `start` to `stop`.

    Args:
        device: kind of device that the model is on.
        shapes: also record the shapes of inputs, which costs more.
    """

    def __init__(self, device: str, *, shapes: bool = False) -> None:
        from torch.profiler import ProfilerActivity, profile, supported_activities

        wanted = {ProfilerActivity.CPU}
        if device != "cpu":
            wanted |= set(supported_activities()) - {ProfilerActivity.CPU}
        self._profile: Any = profile(activities=sorted(wanted, key=str), record_shapes=shapes)
        self._marked_ns: list[tuple[int, int]] = []

    def start(self) -> None:
        self._profile.start()
        for _ in range(8):
            before = time.perf_counter_ns()
            with torch.profiler.record_function(_MARK):
                self._marked_ns.append((before, time.perf_counter_ns()))

    def abandon(self) -> None:
        self._profile.stop()

    def stop(self) -> list[Slice]:
        """What was recorded, in microseconds of `time.perf_counter`."""
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kineto.json")
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        return slices_of(events, self._marked_ns)


def slices_of(
    events: Iterable[Mapping[str, Any]], marked_ns: Iterable[tuple[int, int]]
) -> list[Slice]:
    """Kineto's events on our lanes, moved to the clock on which the marks were set.

    marked_ns: the times just before and within each of the marks that are among the events.
    """
    events = [event for event in events if event.get("ph") == "X" and "dur" in event]
    marks = sorted(float(event["ts"]) for event in events if event["name"] == _MARK)
    # The tightest pair of readings tells best when its mark began.
    _, shift = min(
        (within - before, (before + within) / 2e3 - mark)
        for (before, within), mark in zip(marked_ns, marks, strict=True)
    )
    on_device = any(event.get("cat") in _DEVICE_WORK for event in events)
    rows: dict[tuple[str, Any], int] = {}
    found = []
    for event in events:
        lane = _lane(event, on_device=on_device)
        if lane is None:
            continue
        # Threads of the host and streams of the device are rows.
        row = rows.setdefault((lane, event["tid"]), sum(key[0] == lane for key in rows))
        begin = float(event["ts"]) + shift
        details = dict(_details(event.get("args", {})))
        found.append(Slice(lane, event["name"], begin, begin + event["dur"], row, details))
    return found


def _lane(event: Mapping[str, Any], *, on_device: bool) -> str | None:
    name, category = event["name"], event.get("cat")
    if category in _DEVICE_WORK:
        if "nccl" not in name.lower():
            return "compute"
        return next(lane for word, lane in _KERNEL_LANES if re.search(word, name.lower()))
    if category != "cpu_op" or _NOT_COMPUTE.match(name):
        return None
    return "host" if on_device else "compute"


def _details(args: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, ours in (("Input Dims", "input shapes"), ("Input type", "input dtypes")):
        if args.get(name):
            yield ours, args[name]
