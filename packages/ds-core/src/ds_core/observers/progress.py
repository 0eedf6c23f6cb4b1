"""What a person at the terminal wants to know: one line when the run starts, one now and then."""

from __future__ import annotations

import sys
import time
from typing import IO, TYPE_CHECKING, Any

from ds_core.observers.throughput import Throughput
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.engine import Engine


class Progress:
    """Lines on a text stream from rank 0.

    Args:
        rank: global rank of this process; only 0 writes.
        every_steps: steps between lines; None: at least two seconds pass between them.
        stream: default: standard error.
        breakdown: also show the milliseconds of each phase of a step.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        every_steps: int | None = None,
        stream: IO[str] | None = None,
        breakdown: bool = False,
    ) -> None:
        self._silent = rank != 0
        self._every = every_steps
        self._stream = stream
        self._throughput = Throughput(breakdown=breakdown)
        self._last = 0.0

    def on_event(self, engine: Engine, event: Event) -> None:
        """Write the decisions at the start, and figures of the steps since the last line."""
        if self._silent:
            return
        self._throughput.note(engine, event)
        if event.kind is EventKind.START:
            for name, value in event.values.items():
                self._write(f"{name}: {value}")
        if event.kind is EventKind.CHECKPOINT:
            self._write(f"checkpoint {event.values['action']}: {event.values['path']}")
        if event.kind is EventKind.STEP_END and self._due(event.step):
            self._write(self._line(engine, event))

    def _due(self, step: int) -> bool:
        if self._every is not None:
            return step % self._every == 0
        now = time.monotonic()
        if now - self._last < 2.0:
            return False
        self._last = now
        return True

    def _line(self, engine: Engine, event: Event) -> str:
        parts = [f"step {event.step}"]
        loss = event.values.get("loss")
        if loss is not None:
            parts.append(f"loss {float(loss):.4f}")
        if event.values.get("lr") is not None:
            parts.append(f"lr {event.values['lr']:.2e}")
        if event.values.get("skipped"):
            parts.append(f"skipped (loss scale {event.values['loss_scale']:g})")
        figures = self._throughput.read(engine, event.step)
        if figures:
            parts.append(f"{figures['step_s'] * 1e3:.0f} ms/step{_phases(figures)}")
            parts.append(f"{figures['samples_per_s']:.1f} samples/s")
            parts.append(f"{figures['sent_bytes_per_step'] / 2**20:.1f} MiB sent/step")
        held = sum(size for kind, size in engine.memory().items() if kind != "padding")
        parts.append(f"{held / 2**20:.1f} MiB model state/rank")
        return "  ".join(parts)

    def _write(self, line: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(line + "\n")
        stream.flush()


def _phases(figures: dict[str, Any]) -> str:
    """The phases that were timed, as " (forward 12 ms, ...)", or nothing."""
    names = ("data_s", "forward_s", "backward_s", "norm_s", "update_s")
    timed = [f"{name[:-2]} {figures[name] * 1e3:.0f} ms" for name in names if name in figures]
    return f" ({', '.join(timed)})" if timed else ""
