"""Schedules whose `step` takes arguments, where the engine steps them without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def steps_alone(schedule: Any) -> bool:
    """Whether `schedule.step()` needs no argument."""
    try:
        parameters = inspect.signature(schedule.step).parameters.values()
    except (TypeError, ValueError):
        return True
    return not any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters
    )


class SteppedSchedule:
    """A schedule that is stepped with arguments.

    Args:
        schedule: as the program gave it.
        increment: gives the only argument of its `step`, as Megatron's schedules count samples.
        arguments: keyword arguments instead.
    """

    def __init__(
        self,
        schedule: Any,
        increment: Callable[[], int] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._schedule, self._increment = schedule, increment
        self._arguments = dict(arguments or {})

    def step(self) -> None:
        """Step it with what it needs."""
        if self._increment is not None:
            self._schedule.step(self._increment())
        elif self._schedule is not None:
            self._schedule.step(**self._arguments)

    def state_dict(self) -> dict[str, Any]:
        """Its own."""
        state: dict[str, Any] = self._schedule.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Its own."""
        self._schedule.load_state_dict(state)
