"""How long steps take and what they send: the figures that the other observers show."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ds_core import accelerator
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.engine import Engine

# What the time that ends with an event was spent on.
_PHASES = {
    EventKind.STEP_BEGIN: "data_s",
    EventKind.FORWARD: "forward_s",
    EventKind.BACKWARD: "backward_s",
    EventKind.REDUCED: "norm_s",
    EventKind.STEP_END: "update_s",
}


class Throughput:
    """Time, samples and bytes since the last reading; it does not communicate.

    Args:
        breakdown: also time the phases of a step apart. On an accelerator this waits for the
            device at each event, which costs some of the overlap that it measures.
    """

    def __init__(self, *, breakdown: bool = False) -> None:
        self._breakdown = breakdown
        self._time = self._phase_time = time.perf_counter()
        self._step = 0
        self._sent = 0
        self._phases: dict[str, float] = {}

    def note(self, engine: Engine, event: Event) -> None:
        """Take account of an event; every one must be noted for the breakdown to be whole."""
        if event.kind is EventKind.START:
            self._begin(engine, engine.global_step)
        if not self._breakdown or event.kind not in _PHASES:
            return
        accelerator.Accelerator(engine.device.type).synchronize()
        now = time.perf_counter()
        phase = _PHASES[event.kind]
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._phase_time
        self._phase_time = now

    def read(self, engine: Engine, step: int) -> dict[str, Any]:
        """Figures per step since the start or the last reading; empty if no step was taken.

        step_s, samples_per_s over all ranks, sent_bytes_per_step of this rank, and with
        `breakdown` data_s, forward_s, backward_s, norm_s and update_s.
        """
        steps = step - self._step
        if steps <= 0:
            return {}
        seconds = (time.perf_counter() - self._time) / steps
        samples = engine.micro_batch_size * engine.accumulation * engine.mesh.size("dp")
        figures = {
            "step_s": seconds,
            "samples_per_s": samples / seconds,
            "sent_bytes_per_step": (engine.mesh.ledger.sent_bytes() - self._sent) // steps,
            **{phase: total / steps for phase, total in self._phases.items()},
        }
        self._begin(engine, step)
        return figures

    def _begin(self, engine: Engine, step: int) -> None:
        self._time = self._phase_time = time.perf_counter()
        self._step, self._sent = step, engine.mesh.ledger.sent_bytes()
        self._phases = {}
