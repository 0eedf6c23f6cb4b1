"""Profiles one step of a training run, and tells what the next one achieved."""

from __future__ import annotations

import enum
import sys
import time
from typing import IO, TYPE_CHECKING, Any

import torch.distributed as dist

from ds_core.accelerator import Accelerator
from ds_core.profiling.model_profile import write_report
from ds_core.profiling.profile import Profile
from ds_core.profiling.profiler import FlopsProfiler
from ds_core.profiling.report import number, seconds
from ds_core.profiling.section import FlopsProfilerSection
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine


class _Stage(enum.Enum):
    WAITING = enum.auto()  # for the step to profile
    COUNTING = enum.auto()  # its operations
    TIMING = enum.auto()  # the step after it, as it runs without a profiler
    DONE = enum.auto()


#: What the time that ends with an event was spent on.
_PHASES = {
    EventKind.FORWARD: "forward",
    EventKind.BACKWARD: "backward",
    EventKind.STEP_END: "update",
}


class FlopsObserver:
    """Counts the operations of one optimizer step on rank 0, and reports them with their speed.

    The profiled step counts; the step after it is timed without the profiler in its way, waiting
    for the device between forward, backward and update. A run that ends before has its times from
    the profiled step. Until then and afterwards it does nothing.

    Args:
        section: which step, and how the report looks.
        stream: where the report goes without an output file; default: standard error.

    Attributes:
        profile: of the step, once it is over.
    """

    def __init__(self, section: FlopsProfilerSection, *, stream: IO[str] | None = None) -> None:
        self._section, self._stream = section, stream
        self._stage = _Stage.WAITING
        self._profiler: FlopsProfiler | None = None
        self._seconds: dict[str, float] = {}
        self._seconds_profiled: dict[str, float] = {}
        self._since_s = 0.0
        self.profile: Profile | None = None

    def on_event(self, engine: Engine, event: Event) -> None:
        """Start, stop and time at the edges of the two steps."""
        if self._stage is _Stage.DONE:
            return
        if event.kind is EventKind.CLOSE:
            self._finish(engine)
        elif event.kind is EventKind.STEP_BEGIN:
            self._begin(engine, event)
        elif self._stage is not _Stage.WAITING:
            self._note(engine, event)

    def _begin(self, engine: Engine, event: Event) -> None:
        if self._stage is _Stage.WAITING and event.step == self._section.profile_step:
            self._stage = _Stage.COUNTING
            self._profiler = FlopsProfiler(engine.module)
            self._profiler.start()
        if self._stage is not _Stage.WAITING:
            self._reset_clock(engine)

    def _note(self, engine: Engine, event: Event) -> None:
        if event.kind is EventKind.UPDATE_BEGIN:
            self._stop_counting()
        phase = _PHASES.get(event.kind)
        if phase is not None:
            now = self._now(engine)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since_s
        if event.kind is not EventKind.REDUCED:
            self._reset_clock(engine)
        if event.kind is not EventKind.STEP_END:
            return
        if self._stage is _Stage.COUNTING:
            self._stop_counting()
            self._stage = _Stage.TIMING
            self._seconds_profiled, self._seconds = self._seconds, {}
        else:
            self._report(engine, self._seconds, "in the step after it, without the profiler")
            self._stage = _Stage.DONE

    def _finish(self, engine: Engine) -> None:
        self._stop_counting()
        if self._stage is _Stage.TIMING:
            self._report(engine, self._seconds_profiled, "with the profiler's own cost")
        self._stage = _Stage.DONE

    def _stop_counting(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self.profile = self._profiler.profile()
            self._profiler = None

    def _reset_clock(self, engine: Engine) -> None:
        self._since_s = self._now(engine)

    @staticmethod
    def _now(engine: Engine) -> float:
        Accelerator(engine.device.type).synchronize()
        return time.perf_counter()

    def _report(self, engine: Engine, times: dict[str, float], how: str) -> None:
        profile = self.profile
        if profile is None:
            return
        section = self._section
        text = (
            f"FLOPS profile of optimizer step {section.profile_step} on rank 0: "
            f"{engine.accumulation} micro-batches of {engine.micro_batch_size} samples\n\n"
            f"{_speeds(profile, times, how)}\n\n"
        ) + profile.text(
            module_depth=section.module_depth,
            top_modules=section.top_modules,
            detailed=section.detailed,
        )
        if section.output_file is not None:
            write_report(section.output_file, text)
        else:
            stream = self._stream or sys.stderr
            stream.write(text)
            stream.flush()


def _speeds(profile: Profile, times: dict[str, float], how: str) -> str:
    """Operations per second of this rank's forward, backward and step."""
    work: dict[str, Any] = {
        "forward": profile.forward_flops,
        "backward": profile.backward_flops + profile.recompute_flops,
    }
    lines = [f"This rank, {how}:"]
    for phase, flops in work.items():
        spent = times.get(phase, 0.0)
        if spent:
            rate = number(flops / spent, "FLOP/s")
            lines.append(f"  {phase}: {number(flops)} FLOPs in {seconds(spent)} = {rate}")
    total = sum(times.values())
    if total:
        lines.append(f"  update: {seconds(times.get('update', 0.0))}")
        rate = number(profile.flops / total, "FLOP/s")
        lines.append(f"  step: {number(profile.flops)} FLOPs in {seconds(total)} = {rate}")
        useful = profile.forward_flops + profile.backward_flops
        if profile.recompute_flops:
            rate = number(useful / total, "FLOP/s")
            lines.append(f"  without recomputation: {number(useful)} FLOPs = {rate}")
    return "\n".join(lines)


def from_config(config: Config) -> FlopsObserver | None:
    """The observer that the section asks for, on rank 0; None on the other ranks."""
    section = config.section("flops_profiler")
    if not isinstance(section, FlopsProfilerSection) or not section.enabled:
        return None
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    return FlopsObserver(section) if is_first else None
