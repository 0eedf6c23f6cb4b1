"""An observer of one's own: what a run prints, and the figures that it keeps."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

from evaluate import HeldOut

from ds_core import Engine, accelerator, comm
from ds_core.seams import Event, EventKind

MIB = 2**20


class RunLog:
    """Prints the engine's decisions and a line per `every_steps` steps, and writes each step down.

    On every rank, because it averages the loss over all of them; rank 0 prints and writes.

    Args:
        metrics: file of JSON lines, appended to.
        group: the data-parallel ranks.
        step_tokens: tokens of a step, over all ranks.
        every_steps: steps between two lines on the terminal.
    """

    def __init__(
        self, metrics: Path, group: comm.Group, *, step_tokens: int, every_steps: int
    ) -> None:
        self._metrics, self._group = metrics, group
        self._step_tokens, self._every = step_tokens, every_steps
        self._started = time.perf_counter()
        self._sent_bytes = 0
        self._seconds: list[float] = []  # of each step since the last line

    def on_event(self, engine: Engine, event: Event) -> None:
        """Called by the engine, on every rank, at each of its events."""
        if event.kind is EventKind.START:
            for name, value in event.values.items():
                self.say(f"{name}: {value}")
            self.restart(engine)
        if event.kind is EventKind.CHECKPOINT:
            self.say(f"checkpoint {event.values['action']}: {event.values['path']}")
            self.restart(engine)
        if event.kind is EventKind.STEP_END:
            self._on_step_end(engine, event)

    def say(self, text: str) -> None:
        """Print on rank 0, at once, also into a pipe."""
        if self._group.rank == 0:
            print(text, flush=True)

    def write(self, event: str, step: int, **figures: Any) -> None:
        """Add a line to the metrics; a crash loses none."""
        if self._group.rank == 0:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, "step": step, **figures}) + "\n")

    def evaluated(self, engine: Engine, found: HeldOut) -> None:
        """Tell and keep the loss on held-out text."""
        self.say(f"step {engine.global_step:4d}  held-out text: {found}")
        self.write(
            "evaluation",
            engine.global_step,
            heldout_nats_per_token=found.nats_per_token,
            heldout_bits_per_byte=found.bits_per_byte,
        )
        self.restart(engine)

    def restart(self, engine: Engine) -> None:
        """Measure from now: what came before, such as an evaluation, is not training."""
        self._started = time.perf_counter()
        self._sent_bytes = engine.mesh.ledger.sent_bytes()

    def _on_step_end(self, engine: Engine, event: Event) -> None:
        seconds = time.perf_counter() - self._started
        sent_bytes = engine.mesh.ledger.sent_bytes() - self._sent_bytes
        loss, norm = event.values["loss"].clone(), event.values["grad_norm"]
        comm.all_reduce(loss, self._group, caller="RunLog")
        self._seconds.append(seconds)
        figures = {
            "loss": loss.item() / self._group.size,
            "lr": event.values["lr"],
            "grad_norm": norm if math.isfinite(norm) else None,  # an fp16 step that is skipped
            "tokens_per_s": round(self._step_tokens / seconds, 1),
            "sent_bytes": sent_bytes,
        }
        self.write("step", event.step, **figures)
        if event.step % self._every == 0:
            tokens_per_s = self._step_tokens * len(self._seconds) / sum(self._seconds)
            self._seconds.clear()
            self.say(
                f"step {event.step:4d}  loss {figures['loss']:.4f}  lr {figures['lr']:.1e}  "
                f"{tokens_per_s:,.0f} tokens/s  {sent_bytes / MIB:.1f} MiB sent/step  "
                f"{memory(engine)}"
            )
        self.restart(engine)


def memory(engine: Engine) -> str:
    """What this rank holds between steps, and the most it has used at once."""
    state = sum(size for kind, size in engine.memory().items() if kind != "padding")
    return f"{state / MIB:.1f} MiB model state, {_peak_bytes() / MIB:.0f} MiB peak"


def _peak_bytes() -> int:
    """Largest memory so far: of the accelerator, or on a CPU of the whole process."""
    device = accelerator.current()
    if device.kind != "cpu":
        return device.peak_memory()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
