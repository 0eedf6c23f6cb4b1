"""The figures of every step, computed once and handed to any number of sinks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ds_core.observers.memory import MemoryByPhase
from ds_core.observers.rank_mean import RankMean
from ds_core.observers.sink import Record, Sink
from ds_core.observers.throughput import Throughput, samples_per_step
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.engine import Engine


class Metrics:
    """Gives each sink a `Record` of the start, of steps, of `engine.log`, and of checkpoints.

    Args:
        sinks: written to by rank 0; every other rank passes none.
        every_steps: steps between two records of a step; its times are means over those steps.
        throughput: how time is taken.
        memory: adds its figures; it must be told of an event before this observer.
        loss_over_ranks: whether the loss is the mean over data-parallel ranks, which costs one
            small all-reduce at each record, instead of this rank's own. Every rank must say the
            same.
    """

    def __init__(
        self,
        sinks: Iterable[Sink] = (),
        *,
        every_steps: int = 1,
        throughput: Throughput | None = None,
        memory: MemoryByPhase | None = None,
        loss_over_ranks: bool = False,
    ) -> None:
        self._sinks = list(sinks)
        self._every = every_steps
        self._throughput = throughput or Throughput()
        self._memory = memory
        self._mean = RankMean() if loss_over_ranks else None

    def on_event(self, engine: Engine, event: Event) -> None:
        """Compute what is due and hand it on."""
        if event.kind is EventKind.STEP_END:
            self._step(engine, event)
        elif self._sinks:
            self._throughput.note(engine, event)
            if event.kind in (EventKind.START, EventKind.LOG, EventKind.CHECKPOINT):
                self._write(engine, event, dict(event.values))
        if event.kind is EventKind.CLOSE:
            sinks, self._sinks = self._sinks, []
            for sink in sinks:
                sink.close()

    def _step(self, engine: Engine, event: Event) -> None:
        is_due = event.step % self._every == 0
        values = dict(event.values)
        if is_due and self._mean is not None:
            values["loss"] = self._mean.of(engine, values.get("loss"))
        if not self._sinks:
            return
        self._throughput.note(engine, event)
        if not is_due:
            return
        values.update(self._throughput.read(engine, event.step))
        values["memory_bytes"] = sum(
            size for kind, size in engine.memory().items() if kind != "padding"
        )
        if self._memory is not None:
            values.update(self._memory.read())
        self._write(engine, event, values)

    def _write(self, engine: Engine, event: Event, values: dict[str, Any]) -> None:
        samples = event.step * samples_per_step(engine)
        record = Record(event.kind, event.step, samples, values)
        for sink in self._sinks:
            sink.write(record)
