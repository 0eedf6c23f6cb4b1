"""Records the range test of a training run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from ds_core.errors import DsError
from ds_core.lr_schedules.finding import LRFinding, suggest_lr
from ds_core.seams import Event, EventKind

if TYPE_CHECKING:
    from ds_core.config import Config
    from ds_core.engine import Engine

logger = logging.getLogger(__name__)


class RangeTestRecorder:
    """An observer that records a range test and logs what it tells when the engine closes.

    A config whose scheduler is LRRangeTest has one by itself. The figures are the engine's own of
    this rank; `engine.log` also hands "lr_range_test/steepest", "/lowest" and, if it has,
    "/diverged_at" to every metrics sink.
    """

    def __init__(self) -> None:
        self.lrs: list[float] = []
        self._losses: list[torch.Tensor | float] = []

    @property
    def losses(self) -> list[float]:
        """Of each step."""
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
            self._tell(engine)

    def _tell(self, engine: Engine) -> None:
        try:
            finding = self.finding()
        except DsError as error:
            logger.warning("the learning-rate range test tells nothing: %s", error)
            return
        logger.info("%s", finding)
        figures = {"steepest": finding.steepest, "lowest": finding.lowest}
        if finding.diverged_at is not None:
            figures["diverged_at"] = finding.diverged_at
        engine.log({f"lr_range_test/{name}": value for name, value in figures.items()})


def from_config(config: Config) -> RangeTestRecorder | None:
    """The recorder of a config whose schedule is a range test."""
    section = config.scheduler
    is_test = section is not None and section.type.lower() == "lrrangetest"
    return RangeTestRecorder() if is_test else None
