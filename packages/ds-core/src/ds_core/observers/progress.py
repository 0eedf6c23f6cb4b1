"""What a person at the terminal wants to know: decisions, then a line at times."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from ds_core.observers.memory import MemoryByPhase
from ds_core.observers.rank_mean import RankMean
from ds_core.observers.throughput import PHASES, Throughput
from ds_core.quantities import told_bytes, told_count, told_seconds
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.engine import Engine

#: Steps between lines where all ranks must agree on them and no interval is given.
DEFAULT_STEPS = 10
#: Seconds between lines where no interval is given.
SECONDS = 2.0


class Progress:
    """Lines on a text stream from rank 0.

    Args:
        rank: global rank of this process; only 0 writes.
        every_steps: steps between lines; None: at least two seconds pass between them, or ten steps
            with `loss_over_ranks`.
        stream: default: standard error.
        throughput: how time is taken.
        memory: adds its figures; it must be told of an event before this observer.
        loss_over_ranks: as `Metrics` has it.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        every_steps: int | None = None,
        stream: IO[str] | None = None,
        throughput: Throughput | None = None,
        memory: MemoryByPhase | None = None,
        loss_over_ranks: bool = False,
    ) -> None:
        self._silent = rank != 0
        self._every = every_steps or (DEFAULT_STEPS if loss_over_ranks else None)
        self._stream = stream
        self._throughput = throughput or Throughput()
        self._memory = memory
        self._mean = RankMean() if loss_over_ranks else None
        self._last = float("-inf")

    def on_event(self, engine: Engine, event: Event) -> None:
        """Write the decisions at the start, and figures of the steps since the last line."""
        if event.kind is EventKind.STEP_END:
            self._step(engine, event)
        elif not self._silent:
            self._throughput.note(engine, event)
            if event.kind is EventKind.START and event.values:
                self._write(_block(event.values))
            elif event.kind is EventKind.CHECKPOINT:
                self._write(f"checkpoint {event.values['action']}: {event.values['path']}")

    def _step(self, engine: Engine, event: Event) -> None:
        is_due = self._due(event.step)
        loss = event.values.get("loss")
        if is_due and self._mean is not None:
            loss = self._mean.of(engine, loss)
        if self._silent:
            return
        self._throughput.note(engine, event)
        if is_due:
            self._write(self._line(engine, event, loss))

    def _due(self, step: int) -> bool:
        if self._every is not None:
            return step % self._every == 0
        now = time.monotonic()
        if now - self._last < SECONDS:
            return False
        self._last = now
        return True

    def _line(self, engine: Engine, event: Event, loss: Any) -> str:
        parts = [f"step {event.step}"]
        if loss is not None:
            parts.append(f"loss {float(loss):.4f}")
        if event.values.get("lr") is not None:
            parts.append(f"lr {event.values['lr']:.2e}")
        if event.values.get("skipped"):
            parts.append(f"skipped (loss scale {event.values['loss_scale']:g})")
        figures = self._throughput.read(engine, event.step)
        if "step_s" in figures:
            parts.append(f"{told_seconds(figures['step_s'])}/step")
            parts.append(f"{told_count(figures['samples_per_s'])} samples/s")
        parts += _phases(figures)
        if figures.get("sent_bytes_per_step"):
            parts.append(f"{told_bytes(figures['sent_bytes_per_step'])} sent/step")
        parts += _memory(self._memory.read() if self._memory is not None else {})
        return "  ".join(parts)

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(text + "\n")
        stream.flush()


def _block(decisions: Mapping[str, Any]) -> str:
    """The decisions, one a line, their values below one another."""
    width = max(len(name) for name in decisions)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in decisions.items())


def _phases(figures: Mapping[str, Any]) -> list[str]:
    """The phases that were timed and took any time, as "(forward 12 ms, ...)"."""
    shown = [name for name in PHASES if figures.get(name, 0.0) >= 1e-4]
    told = [f"{name[:-2]} {told_seconds(figures[name])}" for name in shown]
    if "comm_wait_s" in figures:
        told.append(f"of it waiting for ranks {told_seconds(figures['comm_wait_s'])}")
    return [f"({', '.join(told)})"] if told else []


def _memory(figures: Mapping[str, int]) -> list[str]:
    """Memory after each phase and the peak."""
    phases = ("forward", "backward", "update")
    named = [(name, figures.get(f"memory_{name}_bytes")) for name in phases]
    told = [f"{name} {told_bytes(size)}" for name, size in named if size is not None]
    if not told:
        return []
    if figures.get("memory_retries"):
        told.append(f"{figures['memory_retries']} allocation retries")
    return [f"memory after {', '.join(told)}, peak {told_bytes(figures['memory_peak_bytes'])}"]
