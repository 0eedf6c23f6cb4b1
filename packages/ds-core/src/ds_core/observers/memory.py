"""Memory after each phase of a step: the allocator's view on a device, the process's on a CPU."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.engine import Engine

_PHASES = {
    EventKind.FORWARD: "forward",
    EventKind.BACKWARD: "backward",
    EventKind.REDUCED: "norm",
    EventKind.STEP_END: "update",
}
_STATM = Path("/proc/self/statm")


class MemoryByPhase:
    """Bytes at the end of each phase and the most within it, largest over the micro-batches.

    On a device: what torch's allocator has handed out (`allocated`) and holds (`reserved`), and how
    often it had to give memory back to go on (`retries`). On a CPU: the resident memory of
    the process, whose peak the kernel counts for the whole life of the process. Reading moves
    nothing on the device; the allocator's peak counters are reset at each phase.
    """

    def __init__(self) -> None:
        self._figures: dict[str, int] = {}
        self._latest: dict[str, int] = {}

    def on_event(self, engine: Engine, event: Event) -> None:
        """Read the counters where a phase ends."""
        if event.kind is EventKind.STEP_BEGIN:
            self._figures = {}
            if engine.device.type != "cpu":
                torch.accelerator.reset_peak_memory_stats()
        phase = _PHASES.get(event.kind)
        if phase is None:
            return
        found = self._resident() if engine.device.type == "cpu" else self._allocated()
        for name, value in found.items():
            key = f"memory_{phase}_{name}"
            self._figures[key] = max(self._figures.get(key, 0), value)
        if event.kind is EventKind.STEP_END:
            self._latest = {**self._figures, **self._totals(engine)}

    def read(self) -> dict[str, int]:
        """Figures of the last whole step; empty before the first.

        memory_PHASE_bytes and memory_PHASE_peak_bytes for the phases forward, backward, norm and
        update; memory_peak_bytes; on a device also memory_reserved_bytes and memory_retries;
        and model_KIND_bytes, what the sharding holds, by kind.
        """
        return dict(self._latest)

    @staticmethod
    def _allocated() -> dict[str, int]:
        now = torch.accelerator.memory_allocated()
        peak = torch.accelerator.max_memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        return {"bytes": now, "peak_bytes": peak}

    @staticmethod
    def _resident() -> dict[str, int]:
        return {"bytes": resident_bytes()}

    def _totals(self, engine: Engine) -> dict[str, int]:
        kinds = engine.memory().items()
        totals = {f"model_{kind.replace(' ', '_')}_bytes": size for kind, size in kinds}
        if engine.device.type == "cpu":
            totals["memory_peak_bytes"] = peak_resident_bytes()
            return totals
        stats = torch.accelerator.memory_stats()
        peaks = (size for name, size in self._figures.items() if name.endswith("_peak_bytes"))
        totals["memory_peak_bytes"] = max(peaks, default=0)
        totals["memory_reserved_bytes"] = int(stats.get("reserved_bytes.all.current", 0))
        totals["memory_retries"] = int(stats.get("num_alloc_retries", 0))
        return totals


def resident_bytes() -> int:
    """Memory of this process that is in RAM; where the system does not tell, its peak so far."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that `resident_bytes` has been in this process's life."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
