"""How long steps take and what they send: the figures that the other observers show."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_core.engine import Engine


class Throughput:
    """Time, samples and bytes since the last reading.

    `read` gives seconds per step, samples per second over all ranks, and bytes sent by this rank
    per step. It does not communicate.
    """

    def __init__(self) -> None:
        self._time = time.perf_counter()
        self._step = 0
        self._sent = 0

    def start(self, engine: Engine) -> None:
        """Begin to measure now."""
        self._time, self._step = time.perf_counter(), engine.global_step
        self._sent = engine.mesh.ledger.sent_bytes()

    def read(self, engine: Engine, step: int) -> dict[str, Any]:
        """Figures since the last `start` or `read`, and begin again; empty if no step was taken."""
        now, sent, steps = time.perf_counter(), engine.mesh.ledger.sent_bytes(), step - self._step
        if steps <= 0:
            return {}
        seconds = (now - self._time) / steps
        ranks = engine.mesh.size("dp")
        samples = engine.micro_batch_size * engine.accumulation * ranks
        figures = {
            "step_s": seconds,
            "samples_per_s": samples / seconds,
            "sent_bytes_per_step": (sent - self._sent) // steps,
        }
        self._time, self._step, self._sent = now, step, sent
        return figures
