"""Records the range test of a training run."""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING

import torch
import torch.distributed as dist

from ds_core.errors import DsError
from ds_core.lr_schedules.finding import LRFinding, suggest_lr
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine


class RangeTestRecorder:
    """An observer that records a range test and says what it tells when the engine closes.

    A config whose scheduler is LRRangeTest has one by itself, which writes a line on rank 0.

    Args:
        stream: where the line goes; default: standard error.
    """

    def __init__(self, *, stream: IO[str] | None = None) -> None:
        self._stream = stream
        self.lrs: list[float] = []
        self._losses: list[torch.Tensor | float] = []

    @property
    def losses(self) -> list[float]:
        """Of each step, this rank's mean over its micro-batches."""
        return [float(loss) for loss in self._losses]

    def finding(self, *, smoothing: float = 0.9) -> LRFinding:
        """What was recorded tells. Raises DsError as `suggest_lr` does."""
        return suggest_lr(self.lrs, self.losses, smoothing=smoothing)

    def on_event(self, engine: Engine, event: Event) -> None:
        """Record each step; tell at the end."""
        if event.kind is EventKind.STEP_END:
            rate, loss = event.values.get("lr"), event.values.get("loss")
            if rate is not None and loss is not None and rate > 0:
                self.lrs.append(rate)
                # Read at the end: reading now would wait for the device.
                self._losses.append(loss)
        elif event.kind is EventKind.CLOSE:
            self._tell()

    def _tell(self) -> None:
        try:
            told = str(self.finding())
        except DsError as error:
            told = f"the learning-rate range test tells nothing: {error}"
        stream = self._stream or sys.stderr
        stream.write(told + "\n")
        stream.flush()


def from_config(config: Config) -> RangeTestRecorder | None:
    """The recorder of a config whose schedule is a range test, on rank 0."""
    section = config.scheduler
    is_test = section is not None and section.type.lower() == "lrrangetest"
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    return RangeTestRecorder() if is_test and is_first else None
