"""Who watches a training run, or adjusts it, at the events of a step."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ds_core.engine import Engine


class EventKind(enum.Enum):
    """The events of a run, in their order."""

    START = "start"  # the engine is built; values: what was decided
    STEP_BEGIN = "step_begin"  # before the first forward of a step
    FORWARD_BEGIN = "forward_begin"  # before a micro-batch's forward
    FORWARD = "forward"  # a micro-batch's forward is done
    BACKWARD_BEGIN = "backward_begin"  # before a micro-batch's backward
    BACKWARD = "backward"  # a micro-batch's backward is done
    UPDATE_BEGIN = "update_begin"  # the last backward of a step is done, its norm comes next
    REDUCED = "reduced"  # gradients are averaged; values: grad_norm
    STEP_END = "step_end"  # parameters are updated; values: loss, lr, grad_norm, skipped, ...
    LOG = "log"  # the user's own figures, from `engine.log`; values: the figures
    CHECKPOINT = "checkpoint"  # one was saved or loaded; values: path, action
    CLOSE = "close"  # the engine is closed


@dataclass(frozen=True)
class Event:
    """What happened, at which step, with which figures (names carry their units)."""

    kind: EventKind
    step: int
    values: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Observer(Protocol):
    """Called on every rank at every event; must not communicate unless all ranks do."""

    def on_event(self, engine: Engine, event: Event) -> None:
        """See `EventKind` for when, and for what `event.values` holds."""


@runtime_checkable
class InputAdjuster(Observer, Protocol):
    """An observer that also changes what the model is called with: a curriculum, layer dropping."""

    def adjust_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments to call the model with instead; asked before each forward in training."""
