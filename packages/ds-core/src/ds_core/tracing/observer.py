"""Records some steps of a run that an engine drives."""

from __future__ import annotations

import time
from os import PathLike
from typing import TYPE_CHECKING

from ds_core.seams import Event, EventKind
from ds_core.tracing.recorder import Recorder

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine

_PHASES = {
    EventKind.FORWARD: "forward",
    EventKind.BACKWARD: "backward",
    EventKind.REDUCED: "norm",
    EventKind.STEP_END: "update",
}
_BEGINNINGS = {EventKind.FORWARD_BEGIN, EventKind.BACKWARD_BEGIN, EventKind.UPDATE_BEGIN}


class Trace:
    """Records a window of steps once, then is done. Made on every rank, with the same arguments.

    Args:
        folder: see `Recorder`.
        start_step: steps of this run before the window; the first ones are slow and differ.
        num_steps: steps in the window.
        ops, shapes: see `Recorder`.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        start_step: int = 3,
        num_steps: int = 2,
        ops: bool = True,
        shapes: bool = False,
    ) -> None:
        self._folder, self._ops, self._shapes = folder, ops, shapes
        self._to_skip, self._to_record = start_step, num_steps
        self._recorder: Recorder | None = None
        self._phase_ns = self._step_ns = 0

    def on_event(self, engine: Engine, event: Event) -> None:
        """Begin at the window's first step, note its phases, and write after its last."""
        if not self._to_record:
            return
        kind = event.kind
        if self._recorder is not None:
            self._note(event, self._recorder)
            if kind is EventKind.CLOSE:
                self._to_record = 0  # what there is of the window is written below
        if kind is EventKind.STEP_BEGIN and self._recorder is None and not self._to_skip:
            self._recorder = Recorder(
                engine.mesh, self._folder, device=engine.device, ops=self._ops, shapes=self._shapes
            )
            self._recorder.start()
            self._phase_ns = self._step_ns = time.perf_counter_ns()
        elif kind is EventKind.STEP_END:
            if self._recorder is None:
                self._to_skip -= 1
            else:
                self._to_record -= 1
        if self._recorder is not None and not self._to_record:
            recorder, self._recorder = self._recorder, None
            recorder.stop()

    def _note(self, event: Event, recorder: Recorder) -> None:
        now = time.perf_counter_ns()
        if event.kind is EventKind.STEP_BEGIN and now > self._phase_ns:
            recorder.add("phase", "data", self._phase_ns, now)
        elif event.kind in _PHASES:
            recorder.add("phase", _PHASES[event.kind], self._phase_ns, now)
            self._phase_ns = now
        elif event.kind in _BEGINNINGS:
            self._phase_ns = now
        if event.kind is EventKind.STEP_END:
            recorder.add("step", f"step {event.step}", self._step_ns, now)
            self._step_ns = now


def from_config(config: Config) -> Trace | None:
    """The observer that the section "trace" asks for, if it does."""
    from ds_core.observers.sections import section_of
    from ds_core.tracing.section import TraceSection

    section = section_of(config, "trace", TraceSection)
    if not section.enabled:
        return None
    return Trace(
        section.output_path,
        start_step=section.start_step,
        num_steps=section.num_steps,
        ops=section.ops,
        shapes=section.shapes,
    )
