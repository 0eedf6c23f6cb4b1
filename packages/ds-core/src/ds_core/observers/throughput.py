"""How long steps take and what they send: the figures that the other observers show."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ds_core import accelerator
from ds_core.comm import Span
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.engine import Engine

#: What the time that ends with an event was spent on.
_PHASES = {
    EventKind.STEP_BEGIN: "data_s",
    EventKind.FORWARD_BEGIN: "data_s",
    EventKind.FORWARD: "forward_s",
    EventKind.BACKWARD_BEGIN: "loss_s",
    EventKind.BACKWARD: "backward_s",
    EventKind.UPDATE_BEGIN: "other_s",
    EventKind.REDUCED: "norm_s",
    EventKind.STEP_END: "update_s",
}

#: The phases of a step, in their order.
PHASES = tuple(dict.fromkeys(_PHASES.values()))


class Throughput:
    """Time, samples and bytes since the last reading; it does not communicate.

    A step lasts from the end of the one before to its own end, whatever the program did in between:
    what ends with a saved checkpoint is left out.

    Args:
        breakdown: also time the phases of a step apart. On an accelerator this waits for the
            device at each event, which costs some of the overlap that it measures.
        enabled: without, no time is shown at all.
        synchronized: whether the device is waited for before a reading.
    """

    def __init__(
        self, *, breakdown: bool = False, enabled: bool = True, synchronized: bool = True
    ) -> None:
        self._breakdown, self._enabled, self._synchronized = breakdown, enabled, synchronized
        self._time = self._phase_time = self._idle_since = time.perf_counter()
        self._step = 0
        self._sent = 0
        self._waited_ns = 0
        self._phases: dict[str, float] = {}
        self._stop_watching: Callable[[], None] | None = None

    def note(self, engine: Engine, event: Event) -> None:
        """Take account of an event; every one must be noted for the breakdown to be whole."""
        if event.kind is EventKind.START:
            self._begin(engine, engine.global_step)
            if self._breakdown:
                self._stop_watching = engine.mesh.ledger.watch(self._add_wait)
        elif event.kind is EventKind.STEP_END:
            self._idle_since = time.perf_counter()
        elif event.kind is EventKind.CHECKPOINT:
            self._leave_out(engine, was_loaded=event.values.get("action") == "loaded")
        elif event.kind is EventKind.CLOSE and self._stop_watching is not None:
            self._stop_watching()
        if not self._breakdown or event.kind not in _PHASES:
            return
        accelerator.Accelerator(engine.device.type).synchronize()
        now = time.perf_counter()
        phase = _PHASES[event.kind]
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._phase_time
        self._phase_time = now

    def _add_wait(self, span: Span) -> None:
        self._waited_ns += max(0, span.done_ns - span.waited_ns)

    def _leave_out(self, engine: Engine, *, was_loaded: bool) -> None:
        """What happened since the last step ended is no part of the next one."""
        if was_loaded:
            self._begin(engine, engine.global_step)
            return
        now = time.perf_counter()
        self._time += now - self._idle_since
        self._idle_since = self._phase_time = now

    def read(self, engine: Engine, step: int) -> dict[str, Any]:
        """Figures per step since the start or the last reading; empty if no step was taken.

        step_s, samples_per_s over all ranks, sent_bytes_per_step of this rank, and with
        `breakdown` data_s, forward_s, loss_s (between forward and backward), backward_s, other_s
        (between the last backward and the update), norm_s and update_s; and comm_wait_s, the time
        within these in which this rank waited for collectives.
        """
        steps = step - self._step
        if steps <= 0:
            return {}
        if self._synchronized:
            accelerator.Accelerator(engine.device.type).synchronize()
        seconds = (time.perf_counter() - self._time) / steps
        figures: dict[str, Any] = {}
        if self._enabled:
            figures["step_s"] = seconds
            figures["samples_per_s"] = samples_per_step(engine) / seconds
        sent = engine.mesh.ledger.sent_bytes() - self._sent
        figures["sent_bytes_per_step"] = max(0, sent) // steps
        if self._breakdown:
            figures.update({name: self._phases.get(name, 0.0) / steps for name in PHASES})
            figures["comm_wait_s"] = self._waited_ns / steps / 1e9
        self._begin(engine, step)
        return figures

    def _begin(self, engine: Engine, step: int) -> None:
        self._time = self._phase_time = self._idle_since = time.perf_counter()
        self._step, self._sent = step, engine.mesh.ledger.sent_bytes()
        self._waited_ns = 0
        self._phases = {}


def samples_per_step(engine: Engine) -> int:
    """Samples of one optimizer step, over all ranks."""
    return engine.micro_batch_size * engine.accumulation * engine.mesh.size("dp")
